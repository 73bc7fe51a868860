"""The packed executor: only the tokens that make a visit are computed.

The tokens that go again are gathered, with their side inputs, and enter the layer together; what
comes out is put back in their places. They attend to the keys and values of all positions, which
are put together in `StepKeys`: those of tokens that go come out of the same call; those of tokens
that stay but own an entry in this plane (`skipped_kv="project"`, the scope of a second visit) from
a call that leaves the layer at its cache; all others are the plane below's. Rows that a fixed plan
keeps out of a layer have no entries in it at all (`compact`).

It keeps the contract of `visits.dense_visit`, and gives the same numbers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trol.depth.compact import RowsKept, keep_rows
from trol.depth.layer_run import LayerRun
from trol.depth.pace import SPARING, pace_of
from trol.depth.planes import LayerPlanes
from trol.depth.roles import Mask
from trol.depth.selection import Group, crowd_of, everybody, groups_of
from trol.depth.sides import Asking
from trol.depth.spared import without_queries
from trol.host.cache import has_keys, is_growing_and_empty, is_recurrent, offload, prefetch
from trol.host.layers import query_weight


class KeysWritten(Exception):
    """Leaves a layer once its keys and values are known."""


@dataclass(frozen=True)
class Packing:
    """Who enters the layer in one visit."""

    going: list[Group]
    """Those that go through it."""
    leaving: list[Group]
    """Those that leave their keys and values, and no more."""
    keep: bool = False
    """Whether the plane shall hold nothing but the rows that go, from now on."""
    among: bool = False
    """Whether those that go see each other alone, because nobody else leaves keys and values."""

    @classmethod
    def dense(cls, state: Tensor) -> Packing:
        """Everybody. Shape of state: [B, T, D]."""
        return cls([everybody(*state.shape[:2])], [])

    @property
    def groups(self) -> list[Group]:
        """All groups; those that leave are first, so that the others see their keys."""
        return [*self.leaving, *self.going]

    @property
    def computed(self) -> int:
        """Tokens that go through the layer, padding of groups included."""
        return sum(group.size for group in self.going)

    def pairs(self, tokens: int) -> int:
        """Pairs of a query and a key of this step, which has so many tokens in each row."""
        if not self.among:
            return self.computed * tokens
        widths = (tokens if g.tokens is None else g.tokens.shape[1] for g in self.going)
        return sum(g.size * width for g, width in zip(self.going, widths, strict=True))

    @property
    def left(self) -> int:
        """Tokens that leave keys and values."""
        return sum(group.size for group in self.leaving)


class StepKeys:
    """The keys and values of one step, put together group by group."""

    def __init__(self, rows: int, tokens: int, below: tuple[Tensor, Tensor] | None) -> None:
        self.shape, self.below = (rows, tokens), below
        self.held: tuple[Tensor, Tensor] | None = None
        """Shape: [B, H, T, d] each."""
        self.rest: tuple[Any, Any] = ((), {})
        """What a layer hands to its cache beside them."""
        self.stored = False

    def put(self, group: Group, keys: Tensor, values: Tensor) -> None:
        """Adds a group's. Shape: [b, H, m, d] each."""
        if group.rows is None and group.tokens is None:
            self.held = keys, values
            return
        if self.held is None:
            below = self.below or (None, None)
            self.held = self._begun(keys, below[0]), self._begun(values, below[1])
        for held, own in zip(self.held, (keys, values), strict=True):
            group.put(held, own, -2)

    def store(self, slot: Any) -> tuple[Tensor, Tensor]:
        """Writes them to the plane; gives all that it then shows. Shape: [B, H, S, d] each."""
        assert self.held is not None
        args, kwargs = self.rest
        self.stored = True
        return slot.update(*self.held, *args, **kwargs)

    def _begun(self, own: Tensor, below: Tensor | None) -> Tensor:
        if below is not None:
            return below.clone()
        rows, tokens = self.shape
        return own.new_zeros(rows, own.shape[1], tokens, own.shape[3])


class PackedSlot:
    """A slot as one group's call sees it."""

    slot: Any = None

    def __init__(self, slot: Any, step: StepKeys, group: Group, packing: Packing) -> None:
        self.slot, self.step, self.group = slot, step, group
        self.leave, self.among = group in packing.leaving, packing.among
        self.alone = len(packing.going) == 1

    @property
    def __class__(self) -> Any:  # what the slot is an instance of, this is too
        return type(self.slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slot, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All keys and values that the group's rows see. Shape: [b, H, S, d] each."""
        if isinstance(self.slot, RowsKept):
            return self.slot.update(keys, values, *args, **kwargs)
        self.step.put(self.group, keys, values)
        self.step.rest = args, kwargs
        if self.leave:
            raise KeysWritten
        shown = self.step.store(self.slot) if self.alone else self.step.held
        if self.among:
            return keys, values
        assert shown is not None
        return tuple(self.group.rows_in(part) for part in shown)


def is_packable(slot: Any) -> bool:
    """Whether a slot keeps keys and values alone, so that some tokens can write theirs."""
    return has_keys(slot) and not is_recurrent(slot)


def packing_of(slot: Any, going: Tensor, owning: Mask, device: torch.device) -> Packing:
    """Groups of the tokens that go, and of the others that own an entry in this plane.

    Shape: BoolTensor [B, T] each, or one truth for all.
    """
    # Groups of rows take turns: each must see its keys before those of the next are known.
    one = not is_growing_and_empty(slot)
    left = ~going if owning is True else going.new_zeros(going.shape)
    if isinstance(owning, Tensor):
        left = owning.to(going.device) & ~going
    return Packing(groups_of(going, device, one=one), crowd_of(left, device))


def packed_visit(run: LayerRun, state: Tensor, plane: int, packing: Packing) -> Tensor:
    """One visit by the tokens of `packing.going`; the others keep their state.

    Shape: [B, T, D], in and out.
    """
    planes = run.planes
    assert planes is not None
    slot = planes.slots[plane - 1]
    prefetch(planes.cache, slot)
    step = StepKeys(state.shape[0], state.shape[1], _below(planes, plane))
    if packing.keep and packing.going[0].rows is not None:
        keep_rows(slot, packing.going[0].rows, len(state))
    inputs = (run.args, run.kwargs) if packing.among else run.inputs(state)
    asking = Asking(run.site, inputs, slot, state, among=packing.among)
    # Before anything is stored: what masks say of keys hangs on how many there are.
    sides = [asking.of(group, attends=group in packing.going) for group in packing.groups]
    out = state.clone() if packing.going else state
    for group, side in zip(packing.groups, sides, strict=True):
        view = planes.with_slot(PackedSlot(slot, step, group, packing))
        if group in packing.going:
            group.put(out, run.call(group.take(state, -2), side, view), -2)
            continue
        with suppress(KeysWritten), _without_queries(run, group, state):
            run.call(group.take(state, -2), side, view)
    step.held = step.held or step.below
    if step.held is not None and not step.stored:
        step.store(slot)
    offload(planes.cache, slot)
    run.applied += bool(packing.going)
    planes.fresh = step.held or planes.fresh
    return out


def _without_queries(run: LayerRun, group: Group, state: Tensor) -> AbstractContextManager[Any]:
    """Leaves the queries out of a call that stores keys, where that saves time."""
    weight = query_weight(run.layer)
    saved = 0 if weight is None else 2 * weight.numel() * group.size
    if weight is None or not pace_of(state.device, state.dtype).pays(saved, SPARING):
        return nullcontext()
    run.spared += saved
    return without_queries(weight)


def _below(planes: LayerPlanes, plane: int) -> tuple[Tensor, Tensor] | None:
    """The step's keys and values in the plane below, where some positions copy theirs."""
    return planes.fresh if plane > 1 and planes.in_scope is not True else None
