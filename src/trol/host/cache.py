"""Layers of a transformers cache: their kinds, private copies, and what one visit sees.

A cache layer keeps keys and values (`CacheLayerMixin`), a recurrent state
(`LinearAttentionCacheLayerMixin`), or both. Beside them a cache may keep a `TokenState`, something
of each token, which is cropped and reordered as the layers are.
"""

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
    """All that trol calls on every cache layer that keeps keys and values."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores new keys and values [B, H, T, d]; returns those to attend to [B, H, S, d]."""

    def get_seq_length(self) -> Any:
        """How many tokens it has stored; a tensor where compiled code counts them."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys so many new tokens will see, and how many before them they will not."""
        ...

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -`tokens_to_remove` tokens."""

    def reset(self) -> None:
        """Forgets all tokens."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows in another order."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""


GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Classes of cache layers that, while empty, return a step's own keys and values from `update`."""

TENSORS = {
    "keys": "all that keep keys and values, in full",
    "values": "the same",
    "conv_states": "recurrent layers: a dictionary",
    "recurrent_states": "the same",
    "indexer_keys": "layers whose queries choose their keys",
    "_quantized_keys": "layers that quantise: a structure of the backend's own",
    "_quantized_values": "the same",
}
"""Attributes in which cache layers keep something of their tokens, and which layers have them."""

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
    """Appends layers until a cache has layer `layer`: some caches append when one is first used."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())


def has_keys(layer: object) -> bool:
    """Whether a cache layer keeps keys and values."""
    return isinstance(layer, AttentionLayer)


def is_recurrent(layer: object) -> bool:
    """Whether a cache layer keeps a recurrent state."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def has_recurrent_layers(config: Any) -> bool:
    """Whether some layer of a model of this configuration keeps a recurrent state."""
    return any(is_recurrent(layer) for layer in new_cache(config).layers)


def is_indexed(layer: object) -> bool:
    """Whether a cache layer also keeps an index by which queries choose their keys."""
    return hasattr(layer, "update_indexer")


def is_sliding(layer: object) -> bool:
    """Whether a cache layer keeps a window of its newest tokens."""
    return has_keys(layer) and bool(cast(Any, layer).is_sliding)


def is_static(layer: object) -> bool:
    """Whether a cache layer writes into tensors that stay where they are."""
    return isinstance(layer, StaticLayer) or bool(getattr(layer, "is_static", False))


def capacity(layer: object) -> int | None:
    """How many tokens a static layer without a window has place for; None for other layers."""
    if not isinstance(layer, StaticLayer) or is_sliding(layer):
        return None
    return layer.max_cache_len


def is_growing_and_empty(layer: Any) -> bool:
    """Whether a cache layer is empty, and `update` will return the step's own keys as they are."""
    return type(layer) in GROWING and not int(layer.get_seq_length())


def can_take_back(layer: object) -> bool:
    """Whether the newest tokens can be removed from this cache layer, exactly and at any time."""
    inexact = is_recurrent(layer) or is_static(layer) or is_quantised(layer)
    return has_keys(layer) and not inexact


def is_quantised(layer: object) -> bool:
    """Whether a cache layer keeps its older keys and values in few bits."""
    return any(name.endswith("_quantize") for name in dir(type(layer)))


def record_past(cache: Any, layers: Iterable[object], *, on: bool) -> None:
    """Makes sliding windows keep tokens that a crop may bring back into view, or stop doing so."""
    if on:
        cache.activate_past_recording()
        return
    for layer in layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False


def prefetch(cache: Any, layer: Any) -> None:
    """Brings a cache layer back from where an offloading cache keeps it between calls."""
    if cache.offloading:  # transformers fetches the host's own next layer, and no other
        layer.prefetch()


def offload(cache: Any, layer: Any) -> None:
    """Puts a cache layer back where an offloading cache keeps it between calls."""
    if cache.offloading and has_keys(layer) and not (cache.only_non_sliding and is_sliding(layer)):
        layer.offload()


def with_layers(cache: Any, layers: list[Any]) -> Any:
    """A copy of the cache with other layers; all its other attributes are shared."""
    view = object.__new__(type(cache))  # what copy does by way of a pickle
    vars(view).update(vars(cache))
    view.layers = layers
    return view


def fixed_address(tensor: Tensor) -> Tensor:
    """The tensor, marked for compilers as one that is written in place, as transformers does."""
    if not torch.compiler.is_compiling():  # code that is being compiled cannot mark anything
        torch._dynamo.mark_static_address(tensor)
    return tensor


def copy_on_write(layer: Any) -> Any:
    """A private copy of a cache layer: what either stores later, the other does not see.

    Tensors of static layers are cloned, because they are written in place; so are tensors in
    dictionaries (recurrent states), and all tensors of layers that other libraries define. Dynamic
    layers of transformers replace their tensors when they store, so copies share them until then.
    """
    known_maker = type(layer).__module__.partition(".")[0] in ("transformers", "trol")
    twin, shares = copy.copy(layer), known_maker and not is_static(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {key: _cloned(one) for key, one in value.items()})
        elif not shares:
            setattr(twin, name, _cloned(value))
    return twin


def _cloned(value: Any) -> Any:
    return fixed_address(value.clone()) if isinstance(value, Tensor) else value


def held_bytes(layers: Iterable[Any]) -> int:
    """Bytes of the tensors that cache layers keep; one that two layers share counts once."""
    values = (vars(layer).get(name) for layer in layers for name in TENSORS)
    tensors = {id(tensor): tensor for value in values for tensor in _tensors(value)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors inside a structure; of a quantised tensor, those that it wraps."""
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


Written = tuple[Tensor, ...]
"""Keys and values of a step [B, H, T, d], and the index of layers that have one: [B, T, d]."""


class KeysWritten(Exception):
    """Leaves a layer once its keys and values are stored."""


class VisitCacheLayer:
    """A cache layer as one visit sees it: merges new keys and values, keeps and stores them."""

    layer: Any = None  # on the class too: dynamo asks for `__class__` before `__init__` has run

    def __init__(
        self,
        layer: Any,
        in_scope: bool | Tensor,
        fallback: Written | None,
        *,
        stop_after_keys: bool = False,
    ) -> None:
        self.layer = layer
        self.in_scope = in_scope
        self.fallback = fallback
        self.stop_after_keys = stop_after_keys
        self.written: Written = ()

    @property
    def __class__(self) -> Any:  # so that `isinstance` still tells whether the layer is recurrent
        return type(self.layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores the step's keys and values. Shape: [B, H, T, d] each, in and out.

        Raises:
            KeysWritten: `stop_after_keys` is set: the rest of the layer need not run.
        """
        keys, values = self._merged(0, keys, axis=2), self._merged(1, values, axis=2)
        self.written = keys, values, *self.written[2:]
        attended = self.layer.update(keys, values, *args, **kwargs)
        if self.stop_after_keys:
            raise KeysWritten
        return attended

    def update_indexer(self, keys: Tensor) -> Tensor:
        """Stores the index by which queries choose keys. Shape: [B, T, d], in; [B, S, d], out."""
        keys = self._merged(2, keys, axis=1)
        self.written = *self.written[:2], keys
        return self.layer.update_indexer(keys)

    def _merged(self, which: int, new: Tensor, *, axis: int) -> Tensor:
        """The new values of tokens in scope, and the fallback's of others; tokens are on `axis`."""
        if self.fallback is None or self.in_scope is True:
            return new
        if self.in_scope is False:
            return self.fallback[which]
        if new.shape[axis] != self.in_scope.shape[1]:  # of a picture, and so alike in all visits
            return new
        mask = self.in_scope[..., None] if axis == 1 else self.in_scope[:, None, :, None]
        return torch.where(mask, new, self.fallback[which])


def store(layer: Any, written: Written) -> None:
    """Stores in a cache layer what a visit wrote into another."""
    layer.update(*written[:2])
    if len(written) > 2:
        layer.update_indexer(written[2])


class TokenState:
    """Something of each token, kept beside a layer's planes and cropped, reordered with them."""

    def __init__(self, values: Tensor, *, is_static: bool = False) -> None:
        self.values = fixed_address(values) if is_static else values
        """Shape: [B, S, ...]."""
        self.is_static = is_static
        """Whether S is all that the cache can hold, and values are written in place."""

    def reset(self) -> None:
        self.values.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.values = self.values.index_select(0, beam_idx.to(self.values.device))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and not self.is_static:  # static values are overwritten by later tokens
            self.values = self.values[:, : -abs(tokens_to_remove)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.values = self.values[indices]
