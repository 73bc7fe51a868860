"""One layer's place in a cache, as one visit sees it.

What is kept for each position along with a cache, and moves as its layers do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trol.host.cache import at_rest

Slot = Any
"""One layer's place in a cache: a `trol.host.cache.CacheLayer`."""

Written = tuple[Tensor, ...]
"""Keys and values of a step [B, H, T, d], and where queries choose keys, by what: [B, T, d]."""


class KeysWritten(Exception):
    """Leaves a layer once its keys and values are stored."""


class VisitSlot:
    """A slot as one visit sees it: merges new keys and values, remembers them, then stores them."""

    slot: Slot = None  # on the class too: dynamo asks for `__class__` before `__init__` has run

    def __init__(
        self,
        slot: Slot,
        in_scope: bool | Tensor,
        fallback: Written | None,
        *,
        leaves: bool = False,
    ) -> None:
        self.slot = slot
        self.in_scope = in_scope
        self.fallback = fallback
        self.leaves = leaves
        self.written: Written = ()

    @property
    def __class__(self) -> Any:  # whether the slot is recurrent must still be seen
        return type(self.slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slot, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores the step's keys and values. Shape: [B, H, T, d] each, in and out.

        Raises:
            KeysWritten: nobody reads what the layer makes of them.
        """
        keys, values = self._merged(0, keys, axis=2), self._merged(1, values, axis=2)
        self.written = keys, values, *self.written[2:]
        shown = self.slot.update(keys, values, *args, **kwargs)
        if self.leaves:
            raise KeysWritten
        return shown

    def update_indexer(self, keys: Tensor) -> Tensor:
        """Stores what queries choose their keys by. Shape: [B, T, d], in; [B, S, d], out."""
        keys = self._merged(2, keys, axis=1)
        self.written = *self.written[:2], keys
        return self.slot.update_indexer(keys)

    def _merged(self, which: int, new: Tensor, *, axis: int) -> Tensor:
        """What is new of tokens in scope, what is one plane below of others, tokens on `axis`."""
        if self.fallback is None or self.in_scope is True:
            return new
        if self.in_scope is False:
            return self.fallback[which]
        if new.shape[axis] != self.in_scope.shape[1]:  # of a picture, and so alike in all visits
            return new
        mine = self.in_scope[..., None] if axis == 1 else self.in_scope[:, None, :, None]
        return torch.where(mine, new, self.fallback[which])


def store(slot: Slot, written: Written) -> None:
    """Stores in a slot what a visit wrote into another."""
    slot.update(*written[:2])
    if len(written) > 2:
        slot.update_indexer(written[2])


class PositionSlot:
    """Something of each position, kept beside a layer's planes and cropped, reordered with them."""

    def __init__(self, values: Tensor, *, is_static: bool = False) -> None:
        self.values = at_rest(values) if is_static else values
        """Shape: [B, S, ...]."""
        self.is_static = is_static
        """Whether S is all that the cache can hold, and values are written where they are."""

    def reset(self) -> None:
        self.values.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.values = self.values.index_select(0, beam_idx.to(self.values.device))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and not self.is_static:  # there, what comes next is written over it
            self.values = self.values[:, : -abs(tokens_to_remove)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.values = self.values[indices]
