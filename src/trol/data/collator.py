"""Rows to one padded batch; rows may have any number of pictures, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trol.data.chat import IGNORED, Row
from trol.errors import DataError, UsageError


@dataclass(frozen=True)
class Collator:
    """Pads rows of T_i tokens to one batch of B rows and T = max T_i tokens.

    Gives `input_ids`, `attention_mask`, `labels`, `assistant_masks` [B, T] (int64) and, where
    any row has pictures, `pixel_values` [N, ...]: those of all rows, in row order, a row's
    pictures being any number of tiles each.
    """

    pad_token_id: int
    """What padding positions hold."""
    padding_side: Literal["left", "right"] = "right"
    """Where padding goes: right to train, left to generate."""
    multiple: int = 1
    """T is rounded up to a multiple of this many tokens."""

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise UsageError(f"padding_side is {self.padding_side!r}; use 'left' or 'right'.")

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The batch of these rows."""
        if not rows:
            raise DataError("a batch needs at least one row, got none.")

        def stacked(lists: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            return padded(lists, fill, side=self.padding_side, multiple=self.multiple)

        batch = {
            "input_ids": stacked([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": stacked([[1] * len(row.input_ids) for row in rows], 0),
            "labels": stacked([row.labels for row in rows], IGNORED),
            "assistant_masks": stacked([row.assistant_masks for row in rows], 0),
        }
        pictures = [row.pixel_values for row in rows if row.pixel_values is not None]
        if pictures:
            if len(shapes := {tuple(part.shape[1:]) for part in pictures}) > 1:
                raise DataError(
                    f"the pictures of one batch have the shapes {sorted(shapes)}; use an image "
                    "processor that resizes all pictures, or all their tiles, to one size."
                )
            batch["pixel_values"] = torch.cat(pictures)
        return batch


def padded(
    rows: Sequence[Sequence[int]],
    fill: int,
    *,
    side: Literal["left", "right"] = "right",
    multiple: int = 1,
) -> torch.Tensor:
    """Rows of T_i integers as [B, T] (int64), `fill` on one side; T is a multiple of `multiple`."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    if side == "left":
        return torch.tensor([[*(fill,) * (width - len(row)), *row] for row in rows])
    return torch.tensor([[*row, *(fill,) * (width - len(row))] for row in rows])
