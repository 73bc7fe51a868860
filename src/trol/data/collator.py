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
    any row has pictures, `pixel_values` [N, ...]: those of all rows, in row order.
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
        longest = max(len(row.input_ids) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        batch = {
            "input_ids": self._stack([row.input_ids for row in rows], width, self.pad_token_id),
            "attention_mask": self._stack([[1] * len(row.input_ids) for row in rows], width, 0),
            "labels": self._stack([row.labels for row in rows], width, IGNORED),
            "assistant_masks": self._stack([row.assistant_masks for row in rows], width, 0),
        }
        pictures = [row.pixel_values for row in rows if row.pixel_values is not None]
        if pictures:
            batch["pixel_values"] = torch.cat(pictures)
        return batch

    def _stack(self, lists: list[list[int]], width: int, fill: int) -> torch.Tensor:
        """Lists of T_i integers -> [B, width], `fill` on the padding side."""
        if self.padding_side == "left":
            padded = [[fill] * (width - len(values)) + values for values in lists]
        else:
            padded = [values + [fill] * (width - len(values)) for values in lists]
        return torch.tensor(padded)
