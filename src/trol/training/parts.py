"""The parts of a TroL model, and who of them learns in a stage."""

from __future__ import annotations

from torch import nn

MARKS = {
    "mixers": ".depth.",
    "vision": "vision_tower.",
    "projector": "projector.",
}
"""Part -> what its parameters' names contain; whatever else there is belongs to the decoder."""


def part_of(name: str) -> str:
    """The part that a parameter of this name belongs to."""
    return next((part for part, mark in MARKS.items() if mark in name), "decoder")


def let_learn(model: nn.Module, parts: tuple[str, ...], *, low_rank: bool = False) -> None:
    """Lets these parts learn and freezes the others.

    With `low_rank`, the decoder learns through its low-rank updates and nothing else of it does.
    """
    for name, parameter in model.named_parameters():
        part = part_of(name)
        frozen_base = low_rank and part == "decoder" and "lora_" not in name
        parameter.requires_grad_(part in parts and not frozen_base)
