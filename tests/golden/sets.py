"""Reads a golden set: its settings, its tensors, and the cases that its inputs describe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MODEL_FILES = (
    "config.json",
    "weights.safetensors",
    "inputs.safetensors",
    "expected.safetensors",
    "expected.json",
)
UNIT_FILES = ("units.json", "units.safetensors")


class NotGolden(Exception):
    """A folder that is no golden set; the message says what is missing and what to give."""


def is_units(folder: Path) -> bool:
    """Whether the folder holds numbers of single components."""
    return all((folder / name).is_file() for name in UNIT_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """One object of a set; `NotGolden` where the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotGolden(f"{path} cannot be read as JSON ({error}); copy the set again.") from error
    if not isinstance(value, dict):
        raise NotGolden(f"{path} holds a {type(value).__name__}, not an object; copy it again.")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; `NotGolden` where it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise NotGolden(f"{path} cannot be read ({error}); copy the set again.") from error


@dataclass(frozen=True)
class Case:
    """One batch of prompts. B rows, T tokens; N images (or tiles) of P tokens in reading order."""

    name: str
    ids: Tensor
    mask: Tensor
    positions: Tensor
    images: tuple[int, ...]
    """Images (or tiles) of each row."""
    features: Tensor | None = None
    """What the projector reads. Shape: [N, P, width of the features]."""
    pixels: Tensor | None = None
    """The same images as the vision tower reads them. Shape: [N, 3, H, W]."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, padding left out."""
        return self.mask.sum(-1).tolist()

    @property
    def is_one_token(self) -> bool:
        """Whether it is a question of a single token, which upstream never traverses."""
        return self.ids.shape[1] == 1

    def row(self, number: int) -> Case:
        """Row `number` by itself, without padding."""
        real = self.mask[number].bool()
        first = sum(self.images[:number])
        mine = slice(first, first + self.images[number])
        count = int(real.sum())
        return Case(
            f"{self.name}.row{number}_alone",
            self.ids[number][real][None],
            torch.ones(1, count, dtype=self.mask.dtype),
            torch.arange(count)[None],
            self.images[number : number + 1],
            _some(self.features, mine),
            _some(self.pixels, mine),
        )


def _some(images: Tensor | None, mine: slice) -> Tensor | None:
    return images[mine] if images is not None and mine.stop > mine.start else None


class GoldenSet:
    """One tiny model and what the official code made of its inputs."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
        if missing:
            raise NotGolden(
                f"{folder} is no golden set: it has no {', '.join(missing)}; give a folder with "
                f"{', '.join(MODEL_FILES)}, or one with {' and '.join(UNIT_FILES)}."
            )
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.facts = read_json(folder / "expected.json")
        self.inputs = read_tensors(folder / "inputs.safetensors")
        self.expected = read_tensors(folder / "expected.safetensors")
        self.weights = read_tensors(folder / "weights.safetensors")
        if self.config.get("arch") not in ("internlm2", "phi3"):
            raise NotGolden(
                f"{folder / 'config.json'} names the architecture {self.config.get('arch')!r}; "
                "the checker knows 'internlm2' and 'phi3'."
            )

    @property
    def arch(self) -> str:
        """internlm2 or phi3."""
        return self.config["arch"]

    @property
    def switch(self) -> int | None:
        """The most tokens that are embedded with the short RoPE factors; None without factors."""
        scaling = self.config.get("rope_scaling") or {}
        if "short_factor" not in scaling:
            return None
        return self.config["original_max_position_embeddings"]

    @cached_property
    def cases(self) -> list[Case]:
        """Every batch of token ids among the inputs."""
        names = [name.removesuffix(".input_ids") for name in self.inputs if _is_ids(name)]
        return [self._case(name) for name in sorted(names)]

    def case(self, name: str) -> Case:
        """The case of that name."""
        return next(case for case in self.cases if case.name == name)

    def _case(self, name: str) -> Case:
        ids = self.inputs[f"{name}.input_ids"]
        counts = (ids == self.config["image_token_index"]).sum(-1) // self.config[
            "tokens_per_image"
        ]
        pixels = f"{name}.pixel_values"
        return Case(
            name,
            ids,
            self.inputs[f"{name}.attention_mask"],
            self.inputs[f"{name}.position_ids"],
            tuple(counts.tolist()),
            self.inputs.get(f"{name}.image_features"),
            self.inputs.get(pixels, self.expected.get(pixels)),
        )

    def same_factors(self, lengths: list[int], row: int, steps: int = 1) -> int:
        """For how many steps upstream's RoPE factors for this row are those of the row alone.

        Upstream chooses them for the whole batch by its longest row, and keeps keys that were made
        with other factors; step t sees t tokens more than step 0.
        """
        own, most = lengths[row], max(lengths)
        if self.switch is None or min(own, most) > self.switch:
            return steps
        if most > self.switch:
            return 0
        return min(steps, self.switch - most + 1)


def _is_ids(name: str) -> bool:
    return name.endswith(".input_ids")
