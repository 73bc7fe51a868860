"""One layer's place in a cache, as one visit sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Slot = Any
"""One layer's place in a cache: a `trol.host.cache.CacheLayer`."""


class KeysWritten(Exception):
    """Leaves a layer once its keys and values are stored."""


class VisitSlot:
    """A slot as one visit sees it: merges new keys and values, remembers them, then stores them."""

    slot: Slot = None  # on the class too: dynamo asks for `__class__` before `__init__` has run

    def __init__(
        self,
        slot: Slot,
        in_scope: bool | Tensor,
        fallback: tuple[Tensor, Tensor] | None,
        *,
        leaves: bool = False,
    ) -> None:
        self.slot = slot
        self.in_scope = in_scope
        self.fallback = fallback
        self.leaves = leaves
        self.fresh: tuple[Tensor, Tensor] | None = None

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
        if self.fallback is not None and self.in_scope is False:
            keys, values = self.fallback
        elif self.fallback is not None and isinstance(self.in_scope, Tensor):
            mine = self.in_scope[:, None, :, None]  # Shape: [B, 1, T, 1]
            keys = torch.where(mine, keys, self.fallback[0])
            values = torch.where(mine, values, self.fallback[1])
        self.fresh = keys, values
        shown = self.slot.update(keys, values, *args, **kwargs)
        if self.leaves:
            raise KeysWritten
        return shown
