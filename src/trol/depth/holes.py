"""Holes: positions that left no keys and values in a layer because they skipped it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from trol.depth.planes import HOLES, adopt
from trol.depth.roles import Mask
from trol.host.cache import capacity
from trol.host.position_slot import PositionSlot


class Holes:
    """The holes of one layer during one call, and the mask that hides them.

    A position is never hidden from itself: a token that runs has no hole, and the output of one
    that skips is not used, but a row of nothing would make its softmax undefined.
    """

    def __init__(self, cache: Any, layer: int, tokens: int) -> None:
        self.cache, self.layer = cache, layer
        slot = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
        self.room = None if slot is None else capacity(slot)
        self.start: int | Tensor = 0 if slot is None else slot.get_seq_length()
        if isinstance(self.start, Tensor):  # which the first visit advances
            self.start = self.start.clone()
        self.keys, self.offset = (tokens, 0) if slot is None else slot.get_mask_sizes(tokens)
        self.holes: Tensor | None = None

    def dig(self, need: Mask, state: Tensor) -> None:
        """Notes who skips: the tokens not in `need`. Shape of state: [B, T, D]."""
        rows, tokens, _ = state.shape
        if isinstance(need, bool):
            need = torch.full((rows, tokens), need, device=state.device)
        kept = getattr(self.cache, "planes", {}).get((self.layer, HOLES))
        if self.room is None:
            past = need.new_zeros(rows, cast(int, self.start)) if kept is None else kept.values
            kept = PositionSlot(torch.cat([past, ~need], dim=1))  # Shape: [B, start + T]
        else:
            kept = kept or PositionSlot(need.new_zeros(rows, self.room), is_static=True)
            here = torch.arange(tokens, device=need.device) + self.start
            kept.values.index_copy_(1, here, ~need)
        self.holes = kept.values
        if self.cache is not None:
            adopt(self.cache)
            self.cache.planes[self.layer, HOLES] = kept

    def hidden_from(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Which keys are holes to each query, and which come no later: [B, 1, T, S], [T, S]."""
        assert self.holes is not None
        keys = torch.arange(self.offset, self.offset + self.keys, device=state.device)
        queries = (torch.arange(state.shape[1], device=state.device) + self.start)[:, None]
        hidden = torch.nn.functional.pad(
            self.holes, (0, max(0, self.offset + self.keys - self.holes.shape[1]))
        )[:, keys]
        return hidden[:, None, None, :] & (keys != queries), keys <= queries
