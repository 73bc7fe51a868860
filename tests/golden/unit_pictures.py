"""Pictures: bicubic resizing of 8-bit pixels, and tiles by the closest aspect ratio."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from trol.family.published.processors import TiledImageProcessor

from .pictures import ROUNDING, compare_resize, picture, resized
from .report import Report

if TYPE_CHECKING:
    from .units import Units

SIZE = re.compile(r"(\d+)x(\d+)$")
DIGITS = 16
"""Hexadecimal digits of a digest that a table keeps."""

TABLE_STEP = 1
"""The k of the formula for the pictures of the large table."""


def check_resize(units: Units, report: Report) -> None:
    """The picture at another size, and how far 8 bits are from floats there."""
    distances = units.tables.get("resize_u8_vs_float", {})
    for group in units.groups("resize"):
        part = units.part(group)
        want, floats = part["u8_path"], part["float_path"]
        names = f"{group}.u8_path", f"{group}.float_path"
        compare_resize(names, part["image_u8"], want, floats, report)
        report.tick(f"{group}.image_u8")
        if group in distances:
            apart = (resized(part["image_u8"], *want.shape[-2:]) - floats.clamp(0, 255)).abs()
            for key, got in (("max_abs_vs_clamped_float", apart.max()), ("mean_abs", apart.mean())):
                bound = torch.tensor(distances[group][key])
                report.close(f"{group}.{key}", got, bound, at_most=float(bound) + ROUNDING)
    report.tick("resize_u8_vs_float")


def tiles(pixels: Tensor, side: int, **settings: Any) -> BatchFeature:
    """What the tiled image processor makes of a picture; as uint8 if nothing is normalised."""
    size = {"height": side, "width": side}
    return TiledImageProcessor(size=size, **settings)(picture(pixels), return_tensors="pt")


def tiles_u8(pixels: Tensor, side: int) -> Tensor:
    """The tiles before normalising, uint8 [n, side, side, 3]."""
    made = tiles(pixels, side, do_rescale=False, do_normalize=False)["pixel_values"]
    return made.to(torch.uint8).permute(0, 2, 3, 1)


def check_small_tiles(units: Units, report: Report) -> None:
    """All tiles of small pictures."""
    for name in {name.partition(".")[0] for name in units.tensors if re.match(r"tiles\d+\.", name)}:
        for group in units.groups(name):
            part = units.part(group)
            if "image_u8" not in part:
                continue
            side = part["tiles_u8_hwc"].shape[1]
            got = tiles_u8(part["image_u8"], side)
            report.close(f"{group}.tiles_u8_hwc", got.float(), part["tiles_u8_hwc"].float())
            normalised = tiles(part["image_u8"], side)["pixel_values"]
            report.close(f"{group}.normalised", normalised, part["normalised"])
            report.tick(f"{group}.image_u8")


def drawn(width: int, height: int, step: int) -> Tensor:
    """(x (3 + k) + 5 y + 17 c + 60 ((x // 7 + y // 5) mod 2)) mod 256, uint8 [3, H, W]."""
    c, y, x = torch.meshgrid(*(torch.arange(n) for n in (3, height, width)), indexing="ij")
    values = x * (3 + step) + y * 5 + 17 * c + 60 * ((x // 7 + y // 5) % 2)
    return (values % 256).to(torch.uint8)


def check_tables(units: Units, report: Report) -> None:
    """Large pictures, by digests and means; tile counts under other settings."""
    for table in [name for name in units.tables if re.fullmatch(r"tiling\d+", name)]:
        side = int(table.removeprefix("tiling"))
        for row in units.tables[table]:
            _check_row(units, table, side, row, report)
        report.tick(table)
    side = min(int(n.removeprefix("tiles")) for n in _tile_groups(units))
    for row in units.tables.get("tiling_minmax", []):
        _check_count(side, row, report)
    report.tick("tiling_minmax")


def _tile_groups(units: Units) -> set[str]:
    return {n.partition(".")[0] for n in units.tensors if re.match(r"tiles\d+\.", n)}


def _check_row(units: Units, table: str, side: int, row: dict[str, Any], report: Report) -> None:
    width, height = row["width"], row["height"]
    name = f"{table}.{width}x{height}"
    pixels = drawn(width, height, TABLE_STEP)
    got = tiles_u8(pixels, side)
    normalised = tiles(pixels, side)["pixel_values"]
    grid = get_optimal_tiled_canvas(
        (height, width),
        (side, side),
        TiledImageProcessor.min_patches,
        TiledImageProcessor.max_patches,
    )
    facts = {
        "grid": list(grid),
        "tiles": len(got),
        "thumbnail": len(got) > grid[0] * grid[1],
        "sizes": [list(got.shape[1:3])],
        "tile_sha256": [_digest(tile) for tile in got],
    }
    for key, value in facts.items():
        if key in row:
            report.exact(f"{name}.{key}", value, row[key])
    means = {
        "tile_means": got.double().mean((1, 2, 3)),
        "normalised_first_mean": normalised[0].double().mean((1, 2)),
        "normalised_last_std": normalised[-1].double().std((1, 2)),
    }
    for key, value in means.items():
        if key in row:
            report.close(f"{name}.{key}", value, torch.tensor(row[key], dtype=torch.float64))
    for key in row.keys() - facts.keys() - means.keys() - {"width", "height"}:
        report.add(f"{name}.{key}", None, "not checked", passed=False)
    for number, tile in enumerate(got):
        corner = f"tiles{side}.{width}x{height}.tile{number}_corner8"
        if corner in units.tensors:
            want = units.tensors[corner]
            report.close(corner, tile[: want.shape[0], : want.shape[1]].float(), want.float())


def _digest(tile: Tensor) -> str:
    return hashlib.sha256(tile.contiguous().numpy().tobytes()).hexdigest()[:DIGITS]


def _check_count(side: int, row: dict[str, Any], report: Report) -> None:
    """Tiles of a picture; trol always adds the thumbnail, so it is counted off where unwanted."""
    pixels = drawn(row["width"], row["height"], TABLE_STEP)
    count = len(tiles(pixels, side, max_patches=row["max_num"])["pixel_values"])
    if not row["use_thumbnail"] and count > 1:
        count -= 1
    label = "with" if row["use_thumbnail"] else "without"
    name = f"tiling_minmax.{row['width']}x{row['height']} max {row['max_num']} {label} thumbnail"
    report.exact(name, count, row["tiles"])
