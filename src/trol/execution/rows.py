"""Cache layers that hold some rows of a batch alone: those that a plan lets visit the layer.

What a layer takes beside the hidden states: what of it belongs to which row of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

from trol.errors import HostError
from trol.host.cache import AttentionLayer
from trol.host.classes import Specialised, specialised
from trol.host.layers import PER_KEY, PER_TOKEN


class RowSubsetLayer(AttentionLayer, Specialised):  # only in this order can a slot become it
    """Mixin for a slot that is told whole batches, and holds some of their rows."""

    kept: Tensor
    """Which rows. Shape: [b]."""
    batch: int
    """B: how many rows there are."""
    looked_at: tuple[Tensor | None, list[int]] = (None, [])
    """The rows when they were last asked for, and what they are."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores those rows' keys and values. Shape: [b, H, T, d] each, in; [b, H, S, d], out.

        Raises:
            HostError: keys and values of other rows come.
        """
        if len(keys) != len(self.kept):
            raise self._refusal()
        return super().update(keys, values, *args, **kwargs)  # type: ignore[misc]

    def check(self, rows: Sequence[int]) -> None:
        """Raises `HostError` unless these are the rows that it holds."""
        if self.looked_at[0] is not self.kept:  # which a look at the device takes
            self.looked_at = self.kept, self.kept.tolist()
        if self.looked_at[1] != list(rows):
            raise self._refusal()

    def _refusal(self) -> HostError:
        return HostError(
            f"a layer of this cache holds rows {self.kept.tolist()} of {self.batch}, because the "
            "plans that filled it keep the other rows out; start a new cache, or keep those plans."
        )

    def get_seq_length(self) -> int:
        length = super().get_seq_length()  # type: ignore[misc]
        if length or self.keys is None or len(self.keys) or self.keys.ndim < 4:
            return length
        return self.keys.shape[-2]  # all its rows were taken out of the batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self._places()[beam_idx.to(self.kept.device)[self.kept]])  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        each = torch.arange(repeats, device=self.kept.device)
        self.kept = (self.kept[:, None] * repeats + each).flatten()
        self.batch *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = torch.arange(self.batch, device=self.kept.device)[indices]  # also for a mask
        places = self._places()[chosen]
        here = places >= 0
        super().batch_select_indices(places[here])  # type: ignore[misc]
        self.kept, self.batch = here.nonzero()[:, 0], len(chosen)

    def _places(self) -> Tensor:
        """Where each row lies among those that are kept; -1 for the others. Shape: [B]."""
        places = self.kept.new_full((self.batch,), -1)
        places[self.kept] = torch.arange(len(self.kept), device=self.kept.device)
        return places


def hold_rows(slot: object, rows: Tensor, batch: int, device: torch.device) -> None:
    """Makes an empty slot one that holds these rows alone, in place."""
    slot.__class__ = specialised(type(slot), RowSubsetLayer)
    kept = cast(RowSubsetLayer, slot)
    kept.kept, kept.batch = rows.to(device), batch
    kept.looked_at = kept.kept, rows.tolist()


def rows_are_known(value: Any, name: str, batch: int) -> bool:
    """Whether it is known what of a layer's side input belongs to which row."""
    if isinstance(value, tuple | list):
        return all(rows_are_known(part, name, batch) for part in value)
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str | Cache)
    if name in PER_KEY:
        return len(value) % batch == 0
    return value.ndim == len(PER_TOKEN.get(name, ())) and len(value) in (1, batch)


def select_rows(value: Any, name: str, rows: Tensor, batch: int) -> Any:
    """The part of a side input that belongs to some rows [b]; all of what belongs to none.

    Raises:
        HostError: it is not known.
    """
    if isinstance(value, tuple | list):
        return tuple(select_rows(part, name, rows, batch) for part in value)
    if not isinstance(value, Tensor) or len(value) == 1:
        return value
    if not rows_are_known(value, name, batch):
        raise HostError(
            f"a layer takes {name} of shape {list(value.shape)}, of which trol does not know what "
            "belongs to which row, and its cache holds some rows alone; start a new one under "
            "trol.depth.executor(model, 'dense')."
        )
    if name in PER_KEY:
        return value.unflatten(0, (batch, -1)).index_select(0, rows).flatten(0, 1)
    return value.index_select(0, rows)
