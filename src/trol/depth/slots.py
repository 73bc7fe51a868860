"""Slots: one layer's place in a cache, whatever its class: seen by one visit, forked, weighed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from trol.depth.roles import Mask

Slot = Any
"""One layer's place in a cache: a CacheLayerMixin or a LinearAttentionCacheLayerMixin."""

GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Classes of slot whose keys and values, while it is empty, are the step's own."""

STATES = ("keys", "values", "conv_states", "recurrent_states", "indexer_keys")
"""What slots hold of the tokens so far, by name."""

QUANTISED = ("_quantized_keys", "_quantized_values")
"""The same in slots that quantise: a backend's own structure of tensors."""


class VisitSlot:
    """A slot as one visit sees it: merges new keys and values, remembers them, then stores them."""

    slot: Slot = None  # on the class too: dynamo asks for `__class__` before `__init__` has run

    def __init__(self, slot: Slot, in_scope: Mask, fallback: tuple[Tensor, Tensor] | None) -> None:
        self.slot = slot
        self.in_scope = in_scope
        self.fallback = fallback
        self.fresh: tuple[Tensor, Tensor] | None = None

    @property
    def __class__(self) -> Any:  # isinstance(slot, LinearAttentionCacheLayerMixin) must still hold
        return type(self.slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slot, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores the step's keys and values. Shape: [B, H, T, d] each, in and out."""
        if self.fallback is not None and self.in_scope is False:
            keys, values = self.fallback
        elif self.fallback is not None and isinstance(self.in_scope, Tensor):
            mine = self.in_scope[:, None, :, None]  # Shape: [B, 1, T, 1]
            keys = torch.where(mine, keys, self.fallback[0])
            values = torch.where(mine, values, self.fallback[1])
        self.fresh = keys, values
        return self.slot.update(keys, values, *args, **kwargs)


def is_static(slot: Slot) -> bool:
    """Whether a slot writes into tensors that stay where they are."""
    return isinstance(slot, StaticLayer) or getattr(slot, "is_static", False)


def at_rest(tensor: Tensor) -> Tensor:
    """Tells compilers that this tensor will be written where it is, as transformers does."""
    if not torch.compiler.is_compiling():  # which can mark nothing
        torch._dynamo.mark_static_address(tensor)
    return tensor


def fork(slot: Slot) -> Slot:
    """A private copy. Slots that replace what they hold share their past; others are cloned."""
    twin = copy.copy(slot)
    for name, value in vars(slot).items():
        if isinstance(value, dict):
            setattr(twin, name, {key: _cloned(one) for key, one in value.items()})
        elif is_static(slot):
            setattr(twin, name, _cloned(value))
    return twin


def _cloned(value: Any) -> Any:
    return at_rest(value.clone()) if isinstance(value, Tensor) else value


def held_bytes(slots: Iterable[Slot]) -> int:
    """What slots hold of their tokens; what two of them share counts once. Unit: bytes."""
    held = (vars(slot).get(name) for slot in slots for name in (*STATES, *QUANTISED))
    found = {id(tensor): tensor for value in held for tensor in _tensors(value)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors inside a structure; a quantised tensor is what it is made of."""
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
