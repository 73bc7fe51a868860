"""Checks single components against `units`: RoPE, partial LoRA, mixing, vision, tiles, texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import unit_pictures, unit_rope, unit_texts, unit_vision
from .report import Report
from .sets import UNIT_FILES, read_json, read_tensors


@dataclass(frozen=True)
class Units:
    """The numbers of single components, and the tables that describe them."""

    tensors: dict[str, Tensor]
    tables: dict[str, Any]
    prompts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, named without it."""
        inside = {name: t for name, t in self.tensors.items() if name.startswith(f"{prefix}.")}
        return {name.removeprefix(f"{prefix}."): tensor for name, tensor in inside.items()}

    def groups(self, prefix: str, parts: int = 1) -> list[str]:
        """The distinct prefixes one or more parts longer than `prefix`."""
        depth = prefix.count(".") + 1 + parts
        inside = (name for name in self.tensors if name.startswith(f"{prefix}."))
        return sorted({".".join(name.split(".")[:depth]) for name in inside})


CHECKS = (
    unit_rope.check_internlm2,
    unit_rope.check_phi3,
    unit_rope.check_apply,
    unit_vision.check_partial_lora,
    unit_vision.check_mix,
    unit_vision.check_pixel_shuffle,
    unit_vision.check_position_table,
    unit_vision.check_internvit,
    unit_pictures.check_resize,
    unit_pictures.check_small_tiles,
    unit_pictures.check_tables,
    unit_texts.check_filtering,
    unit_texts.check_prompts,
)


@torch.no_grad()
def check_units(folder: Path) -> Report:
    """The report on a folder of units, and on the prompts that lie beside it."""
    tables, tensors = (folder / name for name in UNIT_FILES)
    beside = folder.parent / "prompts.json"
    prompts = read_json(beside) if beside.is_file() else {}
    units = Units(read_tensors(tensors), read_json(tables), prompts)
    names = [*units.tensors, *units.tables, *(f"prompts.{name}" for name in prompts)]
    report = Report(names)
    for check in CHECKS:
        with report.checking(check.__name__):
            check(units, report)
    report.finish()
    return report
