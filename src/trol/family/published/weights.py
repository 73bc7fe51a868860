"""A published checkpoint's tensors under a TroL model's names, made when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trol.errors import DataError
from trol.family.configuration import TrolConfig
from trol.family.published.configs import position_grid
from trol.family.published.files import CURE, Checkpoint
from trol.family.published.layouts import GATES, IGNORED, Part, Source, sources


@dataclass(frozen=True)
class Lazy:
    """A tensor of the model that is read from its file when `[...]` is asked of it.

    transformers asks just this of the values of a state dict, one after the other.
    """

    checkpoint: Checkpoint
    name: str
    part: Part

    def __getitem__(self, index: Any) -> Tensor:
        return self.part(self.checkpoint.read(self.name))[index]


Weights = Mapping[str, Lazy | Tensor]
"""Name in the model -> the tensor, or what reads it."""


def mapped(checkpoint: Checkpoint, family: str, config: TrolConfig) -> dict[str, Lazy]:
    """All weights but the gates.

    Raises:
        DataError: a tensor is missing, has another shape, or does not belong there.
    """
    positions = position_grid(checkpoint, family) ** 2 + 1
    expected = list(sources(family, config, positions))
    _check_names(checkpoint, family, expected)
    for source in expected:
        if (found := checkpoint.shape(source.name)) != source.shape:
            raise DataError(
                f"{checkpoint.file(source.name)}: {source.name!r} has the shape {found}, expected "
                f"{source.shape} by config.json and the other tensors; {CURE}."
            )
    return {
        target: Lazy(checkpoint, source.name, part)
        for source in expected
        for target, part in source.targets.items()
    }


def _check_names(checkpoint: Checkpoint, family: str, expected: list[Source]) -> None:
    wanted = {source.name for source in expected}
    missing = [source.name for source in expected if source.name not in checkpoint]
    if missing:
        files = ", ".join(file.name for file in checkpoint.files())
        raise DataError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(wanted)} tensors of a {family} "
            f"checkpoint, first {missing[0]!r}: in none of {files}; {CURE}."
        )
    surplus = [
        name
        for name in checkpoint.names()
        if name not in wanted and not name.startswith(GATES[family]) and not name.endswith(IGNORED)
    ]
    if surplus:
        raise DataError(
            f"{checkpoint.file(surplus[0])} holds {surplus[0]!r}, one of {len(surplus)} tensors "
            f"that a {family} checkpoint of this size does not have; check that config.json and "
            "the weight files come from the same checkpoint."
        )
