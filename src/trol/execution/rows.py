"""Some rows of a batch alone: those that their own plans let visit a layer.

A cache layer that holds these rows, and what of a layer's other inputs belongs to which row.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Integer
from torch import Tensor
from transformers import Cache

from trol.errors import HostError
from trol.host.cache import AttentionLayer
from trol.host.classes import Specialised, specialised
from trol.host.names import PER_KEY, PER_TOKEN


class RowSubsetLayer(AttentionLayer, Specialised):  # only in this order can a live layer become it
    """Mixin for a cache layer of a whole batch that holds some of its rows."""

    held_rows: Integer[Tensor, " rows"]
    """Which rows. Shape: [b]."""
    batch: int
    """B: how many rows there are."""
    checked: tuple[Tensor | None, list[int]] = (None, [])
    """`held_rows` at the last check, and as a list: each look at the device costs time."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores the held rows' keys and values. Shape: [b, H, T, d] each, in; [b, H, S, d], out.

        Raises:
            HostError: these are keys and values of other rows.
        """
        if len(keys) != len(self.held_rows):
            raise self._refusal()
        return super().update(keys, values, *args, **kwargs)  # type: ignore[misc]

    def check(self, rows: Sequence[int]) -> None:
        """Raises `HostError` unless these are the rows that it holds."""
        if self.checked[0] is not self.held_rows:
            self.checked = self.held_rows, self.held_rows.tolist()
        if self.checked[1] != list(rows):
            raise self._refusal()

    def _refusal(self) -> HostError:
        return HostError(
            f"a layer of this cache holds rows {self.held_rows.tolist()} of {self.batch}, because "
            "the plans that filled it keep the other rows out; start a new cache, or keep those "
            "plans."
        )

    def get_seq_length(self) -> int:
        length = super().get_seq_length()  # type: ignore[misc]
        if length or self.keys is None or len(self.keys) or self.keys.ndim < 4:
            return length
        return self.keys.shape[-2]  # all its rows were taken out of the batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = beam_idx.to(self.held_rows.device)[self.held_rows]
        super().reorder_cache(self._places()[rows])  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        each = torch.arange(repeats, device=self.held_rows.device)
        self.held_rows = (self.held_rows[:, None] * repeats + each).flatten()
        self.batch *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(self.batch, device=self.held_rows.device)[indices]  # also for a mask
        places = self._places()[rows]
        here = places >= 0
        super().batch_select_indices(places[here])  # type: ignore[misc]
        self.held_rows, self.batch = here.nonzero()[:, 0], len(rows)

    def _places(self) -> Tensor:
        """Where each row lies among those that it holds; -1 for the others. Shape: [B]."""
        places = self.held_rows.new_full((self.batch,), -1)
        places[self.held_rows] = torch.arange(len(self.held_rows), device=self.held_rows.device)
        return places


def hold_rows(
    layer: object, rows: Integer[Tensor, " rows"], batch: int, device: torch.device
) -> None:
    """Makes an empty cache layer one that holds these rows alone, in place."""
    layer.__class__ = specialised(type(layer), RowSubsetLayer)
    subset = cast(RowSubsetLayer, layer)
    subset.held_rows, subset.batch = rows.to(device), batch
    subset.checked = subset.held_rows, rows.tolist()


def rows_are_known(value: Any, name: str, batch: int) -> bool:
    """Whether it is known what of a layer's side input belongs to which row."""
    if isinstance(value, tuple | list):
        return all(rows_are_known(part, name, batch) for part in value)
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str | Cache)
    if name in PER_KEY:
        return len(value) % batch == 0
    return value.ndim == len(PER_TOKEN.get(name, ())) and len(value) in (1, batch)


def select_rows(value: Any, name: str, rows: Integer[Tensor, " rows"], batch: int) -> Any:
    """The part of a side input that belongs to some rows [b]; the whole if it belongs to none.

    Raises:
        HostError: it is not known what belongs to which row.
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
