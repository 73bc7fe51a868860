"""Planes: one set of keys and values per visit number, each an ordinary transformers cache layer.

Visit r of a token attends, at every earlier position, to the newest plane <= r that the position
has. That choice is made when keys and values are written: a token that does not make visit r
copies its plane r - 1 entry into plane r, so reading needs no choice and any cache class serves.
Plane 1 is the host's own cache.

Beside its planes a layer may have `Holes`, the positions that skipped it and left no keys and
values, and a record that its policy keeps of each token (`append_token_state`).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from trol.axes import States
from trol.depth.roles import Mask
from trol.errors import HostError
from trol.host.cache import (
    CacheLayer,
    TokenState,
    VisitCacheLayer,
    Written,
    capacity,
    check_cache,
    copy_on_write,
    grow,
    has_keys,
    held_bytes,
    is_growing_and_empty,
    is_indexed,
    is_recurrent,
    is_sliding,
    is_static,
    offload,
    prefetch,
    store,
    with_layers,
)
from trol.host.classes import Specialised, specialised
from trol.host.names import CACHE

HOLES, TOKEN_STATE = 0, -1
"""The numbers under which a layer's holes and its policy's record stand among its planes."""


class PlanedCache(Specialised):
    """Mixin for a live cache that also holds planes above 1, or has layers that never run."""

    layers: list[CacheLayer]
    offloading: bool
    planes: dict[tuple[int, int], CacheLayer]
    """Planes above 1: (layer, visit number) -> slot; under HOLES and TOKEN_STATE a `TokenState`."""
    absent: frozenset[int]
    """Layers that have no keys and values because the whole batch skips them."""

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self.offloading:  # transformers prefetches the next layer, which may never run
            prefetch(self, self.layers[layer_idx])
        return super().update(keys, values, layer_idx, *args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(self._standing_in_for(layer_idx))  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        stand_in = self._standing_in_for(layer_idx)
        return super().get_mask_sizes(query_length, stand_in)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for slot in self.planes.values():
            slot.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        # Not super().crop: an empty sliding layer, one that never ran, cannot crop itself.
        present = [slot for i, slot in enumerate(self.layers) if i not in self.absent]
        for slot in (*present, *self.planes.values()):
            if not is_growing_and_empty(slot):  # a draft never ran the layers that it skips
                slot.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        for slot in self.planes.values():
            slot.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        for slot in self.planes.values():
            slot.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()  # type: ignore[misc]
        for slot in self.planes.values():
            if record := getattr(slot, "activate_past_recording", None):
                record()

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        for key, slot in list(self.planes.items()):
            if is_static(slot):  # compiled code holds its address
                slot.reset()
            else:
                del self.planes[key]

    def _standing_in_for(self, layer: int) -> int:
        # Lengths and mask sizes of a layer that never runs come from one of its kind that does; so
        # do those of a layer without keys, for which transformers may take one that never runs.
        known = layer not in self.absent and layer < len(self.layers)
        if layer >= len(self.layers) or (known and has_keys(self.layers[layer])):
            return layer
        present = [
            i for i, slot in enumerate(self.layers) if i not in self.absent and has_keys(slot)
        ]
        sliding = is_sliding(self.layers[layer])
        same = [i for i in present if is_sliding(self.layers[i]) == sliding]
        return next(iter(same or present), layer)


def install_planes(cache: Any, absent: frozenset[int] | None = None) -> Any:
    """Makes a live cache a `PlanedCache`, in place; `absent` are its layers that never run.

    Raises:
        HostError: it is no transformers cache, or layers that will run missed tokens before.
    """
    check_cache(cache)
    planed: Any = cache
    if not isinstance(cache, PlanedCache):
        if torch.compiler.is_compiling():
            raise HostError(
                "compiled code cannot give a cache its planes; call "
                "trol.depth.prepare_cache(model, cache) before the compiled model and pass that "
                f"cache as {CACHE}, or pass use_cache=False."
            )
        planed.__class__ = specialised(type(cache), PlanedCache)
        planed.planes = {}
        planed.absent = frozenset()
    if absent is not None and absent != planed.absent:
        _check_lengths(planed, absent)
        planed.absent = absent
    return planed


def prepare(cache: Any, visits: Sequence[int], absent: frozenset[int]) -> None:
    """Gives layer l of a cache its planes up to visits[l] at once, so that none is made later.

    A new plane starts as a copy of the one below: at every position, the newest plane so far.
    """
    install_planes(cache, absent)
    for layer, most in enumerate(visits):
        grow(cache, layer)
        below = cache.layers[layer]
        for plane in range(2, most + 1):
            if (layer, plane) not in cache.planes:
                cache.planes[layer, plane] = copy_on_write(below)
            below = cache.planes[layer, plane]


def _check_lengths(cache: Any, absent: frozenset[int]) -> None:
    running = [i for i, slot in enumerate(cache.layers) if i not in absent and has_keys(slot)]
    lengths = {i: int(cache.layers[i].get_seq_length()) for i in running}
    most = max(lengths.values(), default=0)
    short = [i for i in running if lengths[i] < most]
    if short:
        raise HostError(
            f"layers {short} of this cache hold {lengths[short[0]]} of {most} tokens, because an "
            "earlier plan skipped them; start a new cache, or keep skipping them."
        )


class LayerPlanes:
    """The planes of one layer while one call passes through it.

    Args:
        cache: the host's cache for this call.
        layer: which layer.
        bounds: the least and most visits that a token of this call makes.
        in_scope: which tokens own entries in planes above 1; the others copy theirs downwards.
        keep: whether a later token can still read planes above 1.
    """

    def __init__(
        self, cache: Any, layer: int, *, bounds: tuple[int, int], in_scope: Mask, keep: bool
    ) -> None:
        if layer >= len(cache.layers):
            grow(cache, layer)
        self.cache, self.layer, self.in_scope, self.keep = cache, layer, in_scope, keep
        held = cache.planes if isinstance(cache, PlanedCache) else {}
        self.held = 0
        """How many planes above 1 the cache holds of this layer."""
        while (layer, self.held + 2) in held:
            self.held += 1
        self.slots: list[CacheLayer] = [cache.layers[layer]]
        least, most = bounds
        if in_scope is False and not (keep and self.recurrent):
            most = 1
        for plane in range(2, max(most, self.held + 1) + 1):
            # Taken before plane 1 grows: a plane that starts now copies what came before this call.
            self.slots.append(held.get((layer, plane)) or copy_on_write(self.slots[-1]))
        # Tokens outside the scope copy a lower plane, or leave a higher one to be completed.
        some = in_scope is not True
        self.remembers = (most > 1 and some) or (keep and self.held >= (1 if some else least))
        self.fresh: Written | None = None
        self._open: VisitCacheLayer | None = None
        self._slot: CacheLayer | None = None

    @property
    def recurrent(self) -> bool:
        """Whether the layer keeps a recurrent state, which every token advances."""
        return is_recurrent(self.slots[0])

    def stores_keys(self, plane: int) -> bool:
        """Whether a visit leaves keys and values in this plane, and nothing else."""
        slot = self.slots[plane - 1]
        return has_keys(slot) and not is_recurrent(slot) and not is_indexed(slot)

    def enter_visit(self, plane: int, *, stop_after_keys: bool = False) -> Any:
        """The cache to hand to the layer for its visit number `plane`, as of `LayerRun.apply`."""
        self._slot = slot = self.slots[plane - 1]
        if self.cache.offloading:
            prefetch(self.cache, slot)
        if stop_after_keys or (self.remembers and has_keys(slot)):
            self._open = slot = VisitCacheLayer(
                slot, self.in_scope, self.fresh, stop_after_keys=stop_after_keys
            )
        if slot is self.cache.layers[self.layer]:
            return self.cache
        layers = list(self.cache.layers)
        layers[self.layer] = slot
        return with_layers(self.cache, layers)

    def exit_visit(self) -> None:
        """Ends a visit: its keys and values become the fallback of the next."""
        if self._open is not None:
            self.fresh = self._open.written or self.fresh
            self._open = None
        if self.cache.offloading:  # a visit that stopped at its keys has not
            offload(self.cache, self._slot)

    def commit(self, visited: int) -> None:
        """Ends the call: keeps planes above 1, completed where no token visited, or drops them."""
        for plane in range(visited + 1, self.held + 2):
            if self.keep and plane > 1 and self.fresh is not None:
                prefetch(self.cache, self.slots[plane - 1])
                store(self.slots[plane - 1], self.fresh)
                offload(self.cache, self.slots[plane - 1])
        if not self.keep:
            if isinstance(self.cache, PlanedCache):
                drop_planes(self.cache, self.layer)
        elif visited > self.held + 1:
            install_planes(self.cache)
            for plane in range(self.held + 2, visited + 1):
                self.cache.planes[self.layer, plane] = self.slots[plane - 1]


def fork_cache(cache: Any, *, planes: bool) -> Any:
    """A cache that starts from the entries of `cache` and copies them on its first write.

    `planes`: whether it also has the planes above 1, the holes and the policies' records.
    """
    twin = with_layers(cache, [copy_on_write(slot) for slot in cache.layers])
    if isinstance(cache, PlanedCache):
        held = cache.planes if planes else {}
        twin.planes = {key: copy_on_write(slot) for key, slot in held.items()}
    return twin


def drop_planes(cache: PlanedCache, layer: int | None = None) -> None:
    """Frees the planes above 1 of one layer, or of all."""
    for key in [key for key in cache.planes if key[1] > 1 and layer in (None, key[0])]:
        del cache.planes[key]


def cache_bytes(cache: Any) -> int:
    """What a cache holds, planes above 1 included. Unit: bytes."""
    slots = [*cache.layers, *(cache.planes.values() if isinstance(cache, PlanedCache) else ())]
    return held_bytes(slots)


class Holes:
    """The holes of one layer during one call, and the mask that hides them.

    A position is never hidden from itself: a token that runs has no hole, and one that skips has
    an output that is not used, but a mask that hides every key would make its softmax undefined.
    """

    def __init__(self, cache: Any, layer: int, tokens: int) -> None:
        self.cache, self.layer = cache, layer
        slot = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
        self.room = None if slot is None else capacity(slot)
        self.start: int | Tensor = 0 if slot is None else slot.get_seq_length()
        if isinstance(self.start, Tensor):  # the first visit advances it in place
            self.start = self.start.clone()
        self.keys, self.offset = (tokens, 0) if slot is None else slot.get_mask_sizes(tokens)
        self.holes: Tensor | None = None

    def mark_skipped(self, need: Mask, state: States) -> None:
        """Records the tokens not in `need` as holes. Shape of state: [B, T, D]."""
        rows, tokens, _ = state.shape
        if isinstance(need, bool):
            need = torch.full((rows, tokens), need, device=state.device)
        kept = getattr(self.cache, "planes", {}).get((self.layer, HOLES))
        if self.room is None:
            past = need.new_zeros(rows, cast(int, self.start)) if kept is None else kept.values
            kept = TokenState(torch.cat([past, ~need], dim=1))  # Shape: [B, start + T]
        else:
            kept = kept or TokenState(need.new_zeros(rows, self.room), is_static=True)
            here = torch.arange(tokens, device=need.device) + self.start
            kept.values.index_copy_(1, here, ~need)
        self.holes = kept.values
        if self.cache is not None:
            install_planes(self.cache)
            self.cache.planes[self.layer, HOLES] = kept

    def hidden_from(self, state: States) -> tuple[Bool[Tensor, "B 1 T S"], Bool[Tensor, "T S"]]:
        """Which keys are holes to each query, and which come no later: [B, 1, T, S], [T, S]."""
        assert self.holes is not None
        keys = torch.arange(self.offset, self.offset + self.keys, device=state.device)
        queries = (torch.arange(state.shape[1], device=state.device) + self.start)[:, None]
        hidden = torch.nn.functional.pad(
            self.holes, (0, max(0, self.offset + self.keys - self.holes.shape[1]))
        )[:, keys]
        return hidden[:, None, None, :] & (keys != queries), keys <= queries


def append_token_state(
    cache: Any, layer: int, values: Shaped[Tensor, "B T *rest"], start: int
) -> Shaped[Tensor, "B S *rest"]:
    """Appends to a policy's record of each token; returns all of it: [B, T, ...] -> [B, S, ...].

    Raises:
        HostError: the cache holds tokens that are not in the record.
    """
    kept = getattr(cache, "planes", {}).get((layer, TOKEN_STATE))
    if kept is not None:
        values = torch.cat([kept.values, values], dim=1)
    if cache is not None:
        if kept is None and start:
            raise HostError(
                f"this cache holds {start} tokens that the policy in force never looked at; start "
                "a new cache with it."
            )
        install_planes(cache)
        cache.planes[layer, TOKEN_STATE] = TokenState(values)
    return values
