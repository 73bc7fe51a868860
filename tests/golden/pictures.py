"""Checks what the model sees: resizing, normalising, tiling, tower features, projection."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trol.family.published.layouts import resize_position_table
from trol.family.published.processors import SquareImageProcessor, TiledImageProcessor

from .report import Report
from .sets import GoldenSet

ROUNDING = 0.5
EIGHT_BITS = "own: rounded to 8 bits"


def picture(pixels: Tensor) -> Image.Image:
    """The picture with these pixels, uint8 [3, H, W]."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] at another size, as the square image processor has it."""
    size = {"height": height, "width": width}
    seen = SquareImageProcessor(size=size, do_rescale=False, do_normalize=False)(
        picture(pixels), return_tensors="pt"
    )
    return seen["pixel_values"][0].to(torch.uint8)


def compare_resize(
    names: tuple[str, str], pixels: Tensor, want: Tensor, floats: Tensor, report: Report
) -> None:
    """The 8-bit resize, and the float one that `names` has second.

    torch's builds may differ in the first by as much as it differs from the second: nothing
    tighter may be asked for. How much that is, the set's own two results tell; by the mean, which
    moves little, ours do.
    """
    floats = floats.clamp(0, 255)
    got = resized(pixels, *want.shape[-2:]).float()
    bound = float((want.float() - floats).abs().max()) + ROUNDING
    report.close(names[0], got, want.float(), at_most=bound)
    report.close(names[1], got, floats, at_most=bound, note=EIGHT_BITS)
    mean, most = (got - want.float()).abs().mean(), (got - floats).abs().mean() + ROUNDING
    report.close(f"{names[0]} (mean)", mean, torch.zeros(()), at_most=float(most))


@torch.no_grad()
def check_pictures(model: Any, golden: GoldenSet, report: Report) -> None:
    """Every expected picture and feature of a set."""
    for name in [n for n in golden.expected if n.endswith(".u8_path")]:
        _check_resize(model, golden, name.removesuffix(".u8_path"), report)
    for name in [n for n in golden.expected if n.endswith(".position_table_after")]:
        after, before = golden.expected[name], golden.expected[name.replace("after", "before")]
        grid = round((after.shape[-2] - 1) ** 0.5)
        report.close(name, resize_position_table(before, grid), after)
        report.tick(name.replace("after", "before"))
    for case in golden.cases:
        _check_pixels(model, golden, case.name, report)
        if f"{case.name}.vision_features" in golden.expected and case.pixels is not None:
            got = model.model.get_vision_features(case.pixels)
            want = golden.expected[f"{case.name}.vision_features"]
            report.close(f"{case.name}.vision_features", got, want)
            if case.features is not None:
                report.close(f"{case.name}.image_features (input)", got, case.features)


def seen(model: Any, golden: GoldenSet, pixels: list[Tensor]) -> Tensor:
    """What the set's image processor makes of pictures. Shape: [N, 3, H, W]."""
    processor = SquareImageProcessor if golden.arch == "internlm2" else TiledImageProcessor
    side = model.config.vision_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    made = processor(size={"height": height, "width": width})
    return made([picture(one) for one in pixels], return_tensors="pt")["pixel_values"]


def _check_pixels(model: Any, golden: GoldenSet, case: str, report: Report) -> None:
    stacked, name = golden.inputs.get(f"{case}.images_u8"), f"{case}.pixel_values"
    pictures = list(pictures_of(golden, case).values()) if stacked is None else list(stacked)
    want = golden.expected.get(name, golden.inputs.get(name))
    if pictures and want is not None:
        report.close(name, seen(model, golden, pictures), want)


def pictures_of(golden: GoldenSet, case: str) -> dict[int, Tensor]:
    """By row: the pictures `<case>.image<row>_u8`."""
    prefix = f"{case}.image"
    numbers = (
        name.removeprefix(prefix).removesuffix("_u8")
        for name in golden.inputs
        if name.startswith(prefix) and name.endswith("_u8")
    )
    return {
        n: golden.inputs[f"{prefix}{n}_u8"] for n in sorted(int(n) for n in numbers if n.isdigit())
    }


def _check_resize(model: Any, golden: GoldenSet, case: str, report: Report) -> None:
    """One picture's way to the decoder; each station starts from the set's own numbers."""
    expected = golden.expected
    u8, floats = expected[f"{case}.u8_path"], f"{case}.float_path_unclamped"
    pixels = golden.inputs[f"{case}.image_u8"]
    compare_resize((f"{case}.u8_path", floats), pixels, u8, expected[floats], report)
    normalised = expected[f"{case}.normalised_from_u8"]
    report.close(f"{case}.normalised_from_u8", seen(model, golden, [u8]), normalised)
    features = expected[f"{case}.features_from_u8"]
    got = model.model.get_vision_features(normalised)
    report.close(f"{case}.features_from_u8", got, features)
    projected = expected[f"{case}.projected_from_u8"]
    report.close(f"{case}.projected_from_u8", model.model.projector(features), projected)
