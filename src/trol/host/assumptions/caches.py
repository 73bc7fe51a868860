"""What is assumed of caches: `trol.host.cache`, and through it planes, drafts and the oracle."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from trol.host.assumptions.table import Table, differs, tiny_config
from trol.host.cache import (
    GROWING,
    MOVING_METHODS,
    PLAIN_METHODS,
    TENSORS,
    has_keys,
    held_bytes,
    is_recurrent,
    is_sliding,
    record_past,
)

CACHES = Table()

BESIDE_LAYERS = {
    "layers",
    "layer_class_to_replicate",
    "offloading",
    "only_non_sliding",
    "prefetch_stream",
    "_is_user_defined",
}
"""What a cache holds beside its layers; none of it counts tokens."""


def _new() -> list[Any]:
    """An empty layer of each class that stores by replacing."""
    indexed = getattr(cache_utils, "DynamicIndexedLayer", None)
    return [DynamicLayer(), DynamicSlidingWindowLayer(4), *([indexed()] if indexed else [])]


def _step(tokens: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values of a step. Shape: [1, 1, tokens, 2] each."""
    return torch.ones(1, 1, tokens, 2), torch.ones(1, 1, tokens, 2)


@CACHES.row("depth/planes.py PlanedCache: planes follow what moves rows", at_attach=True)
def methods() -> str | None:
    """The methods of a cache that move rows or positions are those that planes follow."""
    public = {name for name in dir(Cache) if not name.startswith("_")}
    methods = {name for name in public if callable(getattr(Cache, name))}
    unknown = sorted(methods - {*MOVING_METHODS, *PLAIN_METHODS})
    missing = [name for name in MOVING_METHODS if name not in methods]
    if unknown or missing:
        return f"Cache also has {unknown} and lacks {missing}"
    return None


@CACHES.row("host/cache.py copy_on_write: planes, drafts, oracle prefixes", at_attach=True)
def replaces() -> str | None:
    """A dynamic cache layer replaces its tensors when it stores, and never writes into them."""
    for layer in _new():
        layer.update(*_step(3))
        before, held = layer.keys, layer.keys.clone()
        twin = copy.copy(layer)
        twin.update(*(2 * part for part in _step()))
        if layer.keys is not before or not torch.equal(before, held):
            return f"{type(layer).__name__} wrote into keys that a copy of it shares"
        if twin.keys.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
            return f"{type(layer).__name__} stored the next token into the storage of the last"
    return None


@CACHES.row("host/cache.py copy_on_write, at_rest: compiled decoding", at_attach=True)
def writes_in_place() -> str | None:
    """A static cache layer writes where its tensors are."""
    layer = StaticLayer(max_cache_len=4)
    layer.update(*_step())
    before = layer.keys
    layer.update(*_step())
    return None if layer.keys is before else "StaticLayer replaced its keys"


@CACHES.row("depth/planes.py crop; speculation", at_attach=True)
def crops() -> str | None:
    """crop(-n) takes the newest n tokens back."""
    layer = DynamicLayer()
    layer.update(*_step(3))
    layer.crop(-2)
    return differs("the length after crop(-2) of 3 tokens", layer.get_seq_length(), 1)


@CACHES.row("depth/planes.py: masks of a layer", at_attach=True)
def mask_sizes() -> str | None:
    """get_mask_sizes(n) tells how many keys n new tokens will see, and the first one's column."""
    layer, window = DynamicLayer(), DynamicSlidingWindowLayer(4)
    for one in (layer, window):
        one.update(*_step(5))
    found = [tuple(one.get_mask_sizes(2)) for one in (layer, window)]
    return differs(
        "get_mask_sizes(2) after 5 tokens, whole and in a window of 4", found, [(7, 0), (5, 2)]
    )


@CACHES.row("depth/visits.py: layers that hold some rows alone", at_attach=True)
def empty_shows_its_own() -> str | None:
    """A cache layer that grows, while it is empty, shows the keys that a step brings."""
    for kind in GROWING:
        layer: Any = kind(*([4] if kind is DynamicSlidingWindowLayer else []))
        keys, values = _step(5)
        shown = layer.update(keys, values)
        if not (torch.equal(shown[0], keys) and torch.equal(shown[1], values)):
            return f"{kind.__name__} shows keys of shape {list(shown[0].shape)} after 5 tokens"
    return None


@CACHES.row("host/cache.py has_keys, is_recurrent, is_sliding: everywhere in depth", at_attach=True)
def kinds() -> str | None:
    """A cache layer tells by its class whether it keeps keys, a window, or a recurrent state."""
    layers = (DynamicLayer(), DynamicSlidingWindowLayer(4), StaticLayer(4), LinearAttentionLayer())
    found = [(has_keys(one), is_sliding(one), is_recurrent(one)) for one in layers]
    wanted = [(True, False, False), (True, True, False), (True, False, False), (False, False, True)]
    return differs("(keys, window, recurrent) of the four kinds", found, wanted)


@CACHES.row("host/cache.py held_bytes: kv_bytes of every trace", at_attach=True)
def names_of_tensors() -> str | None:
    """What a cache layer holds of its tokens lies under names that are counted."""
    layers: list[Any] = [*_new(), StaticLayer(8)]
    for layer in layers:
        layer.update(*_step(3))
        held = [name for name, value in vars(layer).items() if _grows(value)]
        if not held or not held_bytes([layer]):
            return f"{type(layer).__name__} holds {sorted(vars(layer))}, none of them counted"
        if unknown := [name for name in held if name not in TENSORS]:
            return f"{type(layer).__name__} holds {unknown}, which nobody counts"
    state = LinearAttentionLayer()
    parts = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    state.update_conv_state(parts[0])
    state.update_recurrent_state(parts[1])
    if held_bytes([state]) < sum(part.nbytes for part in parts):
        return f"LinearAttentionLayer holds {sorted(vars(state))}, not all of it counted"
    return None


def _grows(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3


@CACHES.row("host/cache.py with_layers: a visit sees the cache with its own plane", at_attach=True)
def nothing_beside_layers() -> str | None:
    """A cache counts no tokens beside its layers."""
    for cache in (
        DynamicCache(config=tiny_config()),
        StaticCache(config=tiny_config(), max_cache_len=8),
    ):
        before = {name: value for name, value in vars(cache).items() if name != "layers"}
        cache.update(*_step(), 0)
        after = {name: value for name, value in vars(cache).items() if name != "layers"}
        if unknown := sorted(set(after) - BESIDE_LAYERS):
            return f"{type(cache).__name__} also holds {unknown}"
        if any(after[name] is not value for name, value in before.items()):
            return f"{type(cache).__name__} changes something beside its layers when it stores"
    return None


class _StandIn:
    """What passes everything on to a cache layer, and says that it is one."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def __class__(self) -> Any:
        return type(self.layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.update(*args, **kwargs)


@CACHES.row("host/cache.py: slots that merge what a visit stores", at_attach=True)
def stands_in() -> str | None:
    """A cache calls `update` of a layer and reads its attributes; an object may stand in for it."""
    cache: Any = DynamicCache(config=tiny_config())
    cache.layers[0] = _StandIn(cache.layers[0])
    cache.update(*_step(), 0)
    found = (cache.get_seq_length(), cache.get_mask_sizes(1, 0), list(cache.is_sliding))
    return differs("length, mask sizes, windows", found, (1, (2, 0), [False, False]))


@CACHES.row("policies/speculation: what is cut off a window again", at_attach=True)
def records() -> str | None:
    """Windows keep what a crop needs from activate_past_recording on, until record_past is off."""
    cache: Any = DynamicCache(config=tiny_config())
    window: Any = DynamicSlidingWindowLayer(3)
    cache.layers[0] = window
    window.update(*_step(4))
    record_past(cache, cache.layers, on=True)
    window.update(*_step(2))
    kept = window.keys.shape[-2]
    window.crop(-2)
    record_past(cache, cache.layers, on=False)
    window.update(*_step(1))
    found = (kept, window.get_seq_length(), window.keys.shape[-2])
    return differs("keys while recording, length and keys after", found, (4, 5, 2))


@CACHES.row("host/cache.py KeysWritten: a layer that is left at its cache", at_attach=True)
def survives_an_error() -> str | None:
    """An error out of `update` leaves the cache as it was."""
    cache: Any = DynamicCache(config=tiny_config())
    cache.update(*_step(), 0)

    def refuse(*_: Any, **__: Any) -> Any:
        raise KeyError

    cache.layers[1].update = refuse
    try:
        cache.update(*_step(), 1)
    except KeyError:
        return differs("the length of layer 0", cache.get_seq_length(), 1)
    return "Cache.update swallowed an error of its layer"


@CACHES.row("depth/planes.py adopt, visits.py: live caches gain planes", at_attach=True)
def change_class() -> str | None:
    """A live cache and its layers may change their class to a subclass."""
    cache: Any = DynamicCache(config=tiny_config())
    cache.__class__ = type("DynamicCache", (DynamicCache,), {})
    cache.layers[0].__class__ = type("DynamicLayer", (DynamicLayer,), {})
    cache.update(*_step(), 0)
    return differs("the length", cache.get_seq_length(), 1)
