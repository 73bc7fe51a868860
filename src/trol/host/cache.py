"""Layers of a transformers cache: what they hold, what they can do, and a private copy of one.

A cache layer keeps keys and values (`CacheLayerMixin`), a recurrent state
(`LinearAttentionCacheLayerMixin`), or both.

One layer's place in a cache, as one visit sees it.

What is kept for each position along with a cache, and moves as its layers do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from trol.errors import HostError

AttentionLayer = CacheLayerMixin
"""The class of cache layers that keep keys and values."""


class CacheLayer(Protocol):
    """One layer's place in a cache: all that trol calls on it."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores new keys and values [B, H, T, d]; gives those to attend to [B, H, S, d]."""

    def get_seq_length(self) -> int:
        """How many tokens it has seen."""
        ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys so many new tokens will see, and how many before them they will not."""
        ...

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest -`tokens_to_remove` tokens back."""

    def reset(self) -> None:
        """Forgets all."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows in another order."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""


GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Classes of cache layers whose keys and values, while they are empty, are the step's own."""

TENSORS = {
    "keys": "all that keep keys and values, in full",
    "values": "the same",
    "conv_states": "recurrent layers: a dictionary",
    "recurrent_states": "the same",
    "indexer_keys": "layers whose queries choose their keys",
    "_quantized_keys": "layers that quantise: a structure of the backend's own",
    "_quantized_values": "the same",
}
"""Attributes that hold what a cache layer keeps of its tokens, and where they are met."""

MOVING_METHODS = (
    "update",
    "reorder_cache",
    "crop",
    "batch_repeat_interleave",
    "batch_select_indices",
    "activate_past_recording",
    "reset",
)
"""The methods of a `Cache` that change rows or positions; planes above 1 follow each of them."""

PLAIN_METHODS = (
    "early_initialization",
    "get_conv_state",
    "get_mask_sizes",
    "get_max_cache_shape",
    "get_max_length",
    "get_query_offset",
    "get_recurrent_state",
    "get_seq_length",
    "has_previous_state",
    "is_recording_past",
    "offload",
    "prefetch",
    "update_conv_state",
    "update_indexer",
    "update_recurrent_state",
)
"""Its other methods, which leave planes above 1 as they are."""


def check_cache(cache: Any) -> None:
    """Raises `HostError` unless this is a transformers cache with one list of layers."""
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise HostError(
            f"got a {type(cache).__name__} as the cache; pass a transformers Cache "
            "(DynamicCache, StaticCache, ...)."
        )


def new_cache(config: Any) -> DynamicCache:
    """An empty cache with the layers that this configuration calls for."""
    return DynamicCache(config=config)


def grow(cache: Any, layer: int) -> None:
    """Makes sure that a cache has its layer `layer`: some make layers when they are first used."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())


def has_keys(layer: object) -> bool:
    """Whether a cache layer keeps keys and values."""
    return isinstance(layer, CacheLayerMixin)


def is_recurrent(layer: object) -> bool:
    """Whether a cache layer keeps a recurrent state."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def has_recurrent_layers(config: Any) -> bool:
    """Whether some layer of a model of this configuration keeps a recurrent state."""
    return any(is_recurrent(layer) for layer in new_cache(config).layers)


def is_indexed(layer: object) -> bool:
    """Whether a cache layer also keeps what queries choose their keys by."""
    return hasattr(layer, "update_indexer")


def is_sliding(layer: object) -> bool:
    """Whether a cache layer keeps a window of its newest tokens."""
    return has_keys(layer) and bool(cast(Any, layer).is_sliding)


def is_static(layer: object) -> bool:
    """Whether a cache layer writes into tensors that stay where they are."""
    return isinstance(layer, StaticLayer) or bool(getattr(layer, "is_static", False))


def capacity(layer: object) -> int | None:
    """How many tokens a cache layer has place for from the start, where it holds all of them."""
    if not isinstance(layer, StaticLayer) or is_sliding(layer):
        return None
    return layer.max_cache_len


def is_growing_and_empty(layer: Any) -> bool:
    """Whether a cache layer holds nothing yet, and will show the step's own keys as they are."""
    return type(layer) in GROWING and not int(layer.get_seq_length())


def can_take_back(layer: object) -> bool:
    """Whether the newest tokens can be cut off this cache layer again, exactly and at any time."""
    kept_whole = has_keys(layer) and not is_recurrent(layer)
    return kept_whole and not is_static(layer) and not is_quantised(layer)


def is_quantised(layer: object) -> bool:
    """Whether a cache layer keeps its older keys and values in few bits."""
    return any(name.endswith("_quantize") for name in dir(type(layer)))


def record_past(cache: Any, layers: Iterable[object], *, on: bool) -> None:
    """Has sliding windows keep what a crop may need again, or no longer."""
    if on:
        cache.activate_past_recording()
        return
    for layer in layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False


def prefetch(cache: Any, layer: Any) -> None:
    """Gets a cache layer from where an offloading cache keeps it between calls."""
    if cache.offloading:  # transformers fetches the host's own next layer, and no other
        layer.prefetch()


def offload(cache: Any, layer: Any) -> None:
    """Puts it back there."""
    if cache.offloading and has_keys(layer):
        stays = cache.only_non_sliding and is_sliding(layer)
        if not stays:
            layer.offload()


def with_layers(cache: Any, layers: list[Any]) -> Any:
    """The same cache with other layers; what it keeps beside them is shared."""
    view = object.__new__(type(cache))  # what copy does by way of a pickle
    vars(view).update(vars(cache))
    view.layers = layers
    return view


def at_rest(tensor: Tensor) -> Tensor:
    """Tells compilers that this tensor will be written where it is, as transformers does."""
    if not torch.compiler.is_compiling():  # which can mark nothing
        torch._dynamo.mark_static_address(tensor)
    return tensor


def copy_on_write(layer: Any) -> Any:
    """A private copy of a cache layer: what either stores later, the other does not see.

    Static layers write in place, so their tensors are cloned; so are the tensors in dictionaries
    (recurrent states), and those of layers of anybody else's making. transformers' own dynamic ones
    replace their tensors when they store, and share their past (an assumption of the table).
    """
    twin, shares = copy.copy(layer), _is_known(layer) and not is_static(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {key: _cloned(one) for key, one in value.items()})
        elif not shares:
            setattr(twin, name, _cloned(value))
    return twin


def _is_known(layer: object) -> bool:
    return type(layer).__module__.partition(".")[0] in ("transformers", "trol")


def _cloned(value: Any) -> Any:
    return at_rest(value.clone()) if isinstance(value, Tensor) else value


def held_bytes(layers: Iterable[Any]) -> int:
    """What cache layers hold of their tokens; what two of them share counts once. Unit: bytes."""
    values = (vars(layer).get(name) for layer in layers for name in TENSORS)
    tensors = {id(tensor): tensor for value in values for tensor in _tensors(value)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


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


Slot = Any
"""One layer's place in a cache: a `trol.host.cache.CacheLayer`."""

Written = tuple[Tensor, ...]
"""Keys and values of a step [B, H, T, d], and where queries choose keys, by what: [B, T, d]."""


class KeysWritten(Exception):
    """Leaves a layer once its keys and values are stored."""


class VisitCacheLayer:
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


class TokenState:
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
