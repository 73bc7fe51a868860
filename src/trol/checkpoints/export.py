"""Baking a plan into a plain transformers checkpoint, which opens without trol."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from trol.checkpoints.adapter import check_writable
from trol.checkpoints.baking import bake, layers_of, visited
from trol.depth import Plan, attached, detach, is_attached
from trol.errors import HostError, UsageError, unwritable
from trol.host.weights import forget_quantisation, is_quantised

CHECKED_TOKENS = 24
"""Length of the random rows on which the baked model is compared with the plan."""

BAKED = ("plain", "plan")
"""Policies without anything but a plan: a host that carries another is not exported."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    destination: str
    layers: int
    """Layers of the model that the plan was made for."""
    kept: list[int]
    """Which of them each layer of the checkpoint is."""
    parameters: int
    difference: float
    """Largest absolute difference of its logits to the plan's, on the inputs compared."""


def export(
    model: Any, processor: Any, plan: Plan, destination: str | Path, *, seed: int = 0
) -> Exported:
    """Writes `plan` baked into `model` as a plain checkpoint, the processor's files beside it.

    The checkpoint applies the plan to every token (scope `all`), whatever is question or answer.

    Raises:
        HostError: the family cannot be baked; the message says what would differ.
        UsageError: the plan does not fit, or the destination exists and is not empty, or cannot be
            made.
    """
    place = Path(destination)
    check_destination(place)
    plain = plain_host(model)
    samples = [random_rows(plain, seed)]
    if isinstance(processor, ProcessorMixin):
        samples.append(picture_row(plain, processor, seed))
    made, difference = bake(plain, plan, samples)
    with _whole_folder(place) as folder:
        made.save_pretrained(folder)
        processor.save_pretrained(folder)
    layers = len(layers_of(plain)[1])
    count = sum(parameter.numel() for parameter in made.parameters())
    return Exported(str(place), layers, visited(plan, layers), count, difference)


def plain_host(model: Any) -> PreTrainedModel:
    """The model without its policy, if that has nothing to bake but a plan.

    Raises:
        HostError: the model carries trained parameters of a policy, adapters or quantised weights.
    """
    if getattr(model, "depth_in_config", False):
        raise HostError(
            f"a {type(model).__name__} needs trol to open, whatever its layers; export the host "
            "that it was made of, or run the plan with trol (--depth)."
        )
    check_policy(model)
    if is_attached(model):
        detach(model)
    if not isinstance(model, PreTrainedModel):
        raise HostError(
            f"{type(model).__name__} is no plain transformers model; merge its adapters into it "
            "first (merge_and_unload)."
        )
    if is_quantised(model):
        raise HostError("the weights are quantised; open the model with its full weights.")
    forget_quantisation(model)
    return model


def check_policy(model: Any) -> None:
    """Raises `HostError` where a model carries a policy that cannot be baked."""
    name = attached(model)[1].depth_policy.name if is_attached(model) else "plain"
    if name not in BAKED:
        raise HostError(
            f"this model carries the policy '{name}', which decides while running and cannot be "
            "baked into fewer layers; export the host it was attached to."
        )


def random_rows(model: Any, seed: int) -> dict[str, Tensor]:
    """Two rows of random text ids, no mark of a picture among them. Shape: [2, T]."""
    text = model.config.get_text_config(decoder=True)
    marks = {
        value
        for name, value in model.config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    words = torch.tensor([token for token in range(text.vocab_size) if token not in marks])
    most = getattr(text, "max_position_embeddings", None) or CHECKED_TOKENS
    source = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(words), (2, min(CHECKED_TOKENS, most)), generator=source)
    ids = words[chosen].to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def picture_row(model: Any, processor: Any, seed: int) -> dict[str, Tensor]:
    """One row that asks about a random picture, through the processor's chat template."""
    source = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (64, 64, 3), generator=source, dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs.to(model.device))


def check_destination(destination: str | Path) -> None:
    """Raises `UsageError` where something is there already, or nothing can be written."""
    place = Path(destination)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{place} exists and is not empty; name a folder that is not there yet.")
    check_writable(place)


@contextmanager
def _whole_folder(place: Path) -> Generator[Path]:
    """A folder that becomes `place` when all is in it; nothing stays if that fails."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.partial-"))
    except OSError as error:
        raise unwritable(place, error) from error
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
