"""Packed visits: only tokens whose output somebody reads are computed.

Where no token goes again, a layer is entered for its keys and values alone, and left at its
cache. And in generation nothing but the last token's logits is read, so the last visit to the
last layer is made by the last token, which attends to the keys and values of all.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

if TYPE_CHECKING:
    from trol.depth.visits import LayerRun

PER_TOKEN = {
    "attention_mask": -2,
    "image_tokens": -1,
    "per_layer_input": -2,
    "position_embeddings": -2,
    "position_ids": -1,
}
"""Side inputs of a layer that go with its tokens, and in which dimension the tokens lie."""

PER_KEY = ("alibi",)
"""Side inputs that go with the keys, which stay as they are."""


class KeysWritten(Exception):
    """Leaves a layer once its keys and values are stored."""


class LeftAtKeys:
    """A slot that stores keys and values, and ends the pass."""

    slot: Any = None

    def __init__(self, slot: Any) -> None:
        self.slot = slot

    @property
    def __class__(self) -> Any:  # what the slot is an instance of, this is too
        return type(self.slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slot, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Raises `KeysWritten`. Shape: [B, H, T, d] each."""
        self.slot.update(keys, values, *args, **kwargs)
        raise KeysWritten


class WrittenOnce(LeftAtKeys):
    """A slot that stores keys and values of all tokens, ends that pass, and shows them after it."""

    held: Any = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All keys and values of the layer so far. Shape: [B, H, S, d] each."""
        if self.held is None:
            self.held = self.slot.update(keys, values, *args, **kwargs)
            raise KeysWritten
        return self.held


def keys_only(run: LayerRun, state: Tensor, layer: int, plane: int) -> bool:
    """Leaves the keys and values of all tokens in plane `plane`, and their states as they are.

    False, and nothing done, where this layer cannot do it. Shape of state: [B, T, D].
    """
    planes = run.planes
    if planes is None or not _keeps_keys(planes.slots[plane - 1]):
        return False
    view = planes.opened(plane)
    if view is run.cache:
        view = copy.copy(view)
        view.layers = list(view.layers)
    view.layers[layer] = LeftAtKeys(view.layers[layer])
    with suppress(KeysWritten):  # a layer that stores none runs to its end
        run.call(state, (run.args, run.kwargs), view)
    planes.close()
    return True


def last_visit(run: LayerRun, state: Tensor, layer: int, plane: int) -> Tensor | None:
    """One visit whose output only the last token of each row has; the others keep their state.

    Shape: [B, T, D], in and out. None, and nothing done, where this layer cannot do it.
    """
    planes, last = run.planes, last_inputs(run, state.shape[1])
    if planes is None or last is None or not _packable(run, planes.slots[plane - 1]):
        return None
    view = planes.opened(plane)
    view.layers[layer] = WrittenOnce(view.layers[layer])
    run.applied += 1
    try:
        whole = run.call(state, (run.args, run.kwargs), view)
    except KeysWritten:
        planes.close()
        out = run.call(state[:, -1:], last, view)
        return torch.cat([state[:, :-1], out], dim=1)
    planes.close()
    return whole  # the layer stored nothing, so this was a whole visit


def _keeps_keys(slot: Any) -> bool:
    recurrent = isinstance(slot, LinearAttentionCacheLayerMixin)
    return isinstance(slot, CacheLayerMixin) and not recurrent


def _packable(run: LayerRun, slot: Any) -> bool:
    if not _keeps_keys(slot):
        return False
    # Without a mask one query sees all keys: right, unless some of them are not written yet.
    return run.site.mask_in(run.args, run.kwargs) is not None or not isinstance(slot, StaticLayer)


def last_inputs(run: LayerRun, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A layer's arguments for its last token, or None where one of them is not understood."""
    names = run.site.names[: len(run.args)]
    given = {**dict(zip(names, run.args, strict=True)), **run.kwargs}
    kept = {
        name: value if name in PER_KEY else _last(value, PER_TOKEN.get(name), tokens)
        for name, value in given.items()
    }
    if any(kept[name] is None and value is not None for name, value in given.items()):
        return None
    return tuple(kept.pop(name) for name in names), kept


def _last(value: Any, dimension: int | None, tokens: int) -> Any:
    if isinstance(value, tuple | list) and value and dimension is not None:
        parts = [_last(part, dimension, tokens) for part in value]
        return None if any(part is None for part in parts) else tuple(parts)
    if not isinstance(value, Tensor):
        return value if _plain(value) else None
    if dimension is None or value.ndim < -dimension or value.shape[dimension] != tokens:
        return None
    return value.narrow(dimension, tokens - 1, 1)


def _plain(value: Any) -> bool:
    """Whether an argument says the same for every selection of tokens."""
    return value is None or isinstance(value, bool | int | float | str | Cache)
