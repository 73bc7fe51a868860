"""Executors: one visit of one layer, by whichever does least for it.

Contract: an executor is told which tokens go again and which plane they read and write. (1) It
writes that plane exactly once, for all T positions; (2) where a token does not go again it returns
its state unchanged. `dense_visit` computes all tokens and selects: the readable reference.
`packed_visit` (`packed.py`) computes those that go.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from trol.depth.call import Call, Kind
from trol.depth.compact import RowsKept
from trol.depth.layer_run import LayerRun
from trol.depth.pace import pace_of
from trol.depth.packed import Packing, growing, packable, packed_visit, packing_of
from trol.depth.planes import LayerPlanes
from trol.depth.policy import Visit
from trol.depth.roles import Mask
from trol.depth.selection import Group, everybody, groups_of
from trol.depth.sides import masked, understood


def dense_visit(run: LayerRun, state: Tensor, need: Mask, plane: int) -> Tensor:
    """One visit by computing all tokens; those not in `need` keep their state."""
    visited = run.apply(state, plane)
    if isinstance(need, bool):
        return visited if need else state
    return torch.where(need[..., None], visited, state)


def make_visit(run: LayerRun, visit: Visit, need: Mask, call: Call, *, last: bool) -> Tensor:
    """One more visit. `last`: nobody goes again after it. Shape: [B, T, D]."""
    state, plane = visit.state, visit.number + 1
    packing = _packing(run, visit, need, call, last=last)
    if packing is None:
        # What a token does not take weighs 0, but it is what the gradient of that choice is made of.
        shown = True if last and torch.is_grad_enabled() and isinstance(need, Tensor) else need
        out, packing = dense_visit(run, state, shown, plane), Packing.dense(state)
    elif _checked(run, visit, packing, call):
        out = packed_visit(run, state, plane, packing)
    else:
        out, packing = _compared(run, visit, need, packing, call), Packing.dense(state)
    if call.recorder is not None:
        call.recorder.visit(visit.layer, need, state, packing.computed, packing.left)
    return out


def _packing(run: LayerRun, visit: Visit, need: Mask, call: Call, *, last: bool) -> Packing | None:
    """Who enters the layer, where that is not everybody; None for the dense executor."""
    fixed = call.rows_going(visit)
    only_last = last and visit.number > 0 and call.only_last_of(visit.layer) and fixed is None
    if need is True and not only_last:
        return None
    kept = _kept_already(run, visit, fixed)
    if kept is not None or not call.packs:
        return kept
    planes = _planes_of(run, visit, call)
    if not packable(planes, visit.number + 1):
        return None
    state = visit.state
    if not _could_pay(visit, need, call):
        return None
    going = need if isinstance(need, Tensor) else torch.full(state.shape[:2], need)
    if only_last:
        going = going & (torch.arange(state.shape[1], device=going.device) == state.shape[1] - 1)
    owning = planes.in_scope if visit.number else True
    if fixed is not None or (run.holes is not None and not visit.number):
        owning = need
    if not going.any():
        return _nobody(run, state, owning)
    slot = planes.slots[visit.number]
    if not (call.gathers and understood(run, *state.shape[:2]) and masked(run, slot)):
        return None
    packing = packing_of(planes, visit.number + 1, going, owning, state.device)
    fresh = growing(slot)
    packing = replace(
        packing,
        keep=fixed is not None and fresh and len(packing.going) == 1,
        among=run.holes is not None and not visit.number and fresh and _in_order(run, packing),
    )
    fails = call.verdicts.get(_kind(run, visit, packing)) is False
    return packing if not fails and _pays(packing, visit, call) else None


def _kept_already(run: LayerRun, visit: Visit, fixed: tuple[bool, ...] | None) -> Packing | None:
    """The rows of a plane that holds those alone, if the policy in force still means them."""
    slot = None if run.planes is None else run.planes.slots[visit.number]
    if fixed is None or not isinstance(slot, RowsKept):
        return None
    if slot.kept.tolist() != [row for row, goes in enumerate(fixed) if goes]:
        return None  # what follows brings other rows, which the slot refuses
    return Packing([Group(slot.kept, None, None, len(slot.kept) * visit.state.shape[1])], [])


def _planes_of(run: LayerRun, visit: Visit, call: Call) -> LayerPlanes:
    """The run's planes; where there is no cache, on one for this layer's pass alone."""
    if run.planes is None:
        most = max(call.policy.bounds(visit.layer).most, 1)
        run.cache = call.scratch()
        run.planes = LayerPlanes(
            run.cache, visit.layer, most=most, in_scope=call.in_scope, keep=False
        )
    return run.planes


def _nobody(run: LayerRun, state: Tensor, owning: Mask) -> Packing | None:
    """Nobody goes through: the layer is entered for keys and values alone."""
    rows, tokens = state.shape[:2]
    if owning is True or (run.holes is not None and not understood(run, rows, tokens)):
        return Packing([], [everybody(rows, tokens)])
    if not understood(run, rows, tokens):
        return None
    left = owning if isinstance(owning, Tensor) else torch.zeros(rows, tokens, dtype=torch.bool)
    if run.holes is not None:  # which nobody will see; their form alone is wanted
        left = torch.zeros_like(left)
        left[:, 0] = True
    return Packing([], groups_of(left, state.device))


def _in_order(run: LayerRun, packing: Packing) -> bool:
    """Whether what fills short rows up, at their ends, is hidden from the tokens before it."""
    if run.site.mask_in(run.args, run.kwargs) is None:
        return run.site.causal
    return all(group.real is None for group in packing.going)


def _could_pay(visit: Visit, need: Mask, call: Call) -> bool:
    """Whether leaving out those who do not go could save time, were all else for nothing."""
    cost = call.costs().layers[visit.layer]
    if call.executor == "packed" or cost is None or isinstance(need, bool):
        return call.executor == "packed" or isinstance(need, bool)
    count = int(need.sum())
    saved = cost.flops(need.numel() - count, step=need.shape[1])
    return not count or pace_of(visit.state.device, visit.state.dtype).pays(saved, 1)


def _pays(packing: Packing, visit: Visit, call: Call) -> bool:
    """Whether leaving tokens out takes less time than gathering the others."""
    cost = call.costs().layers[visit.layer]
    if call.executor == "packed" or cost is None:
        return call.executor == "packed"
    rows, tokens, _ = visit.state.shape
    whole = cost.flops(rows * tokens, step=tokens)
    left = whole // (rows * tokens) if cost.keys_per_token is None else cost.keys_per_token
    saved = whole - cost.flops(packing.computed, step=tokens) - left * packing.left
    calls = len(packing.going) + len(packing.leaving)
    return pace_of(visit.state.device, visit.state.dtype).pays(saved, calls)


def _kind(run: LayerRun, visit: Visit, packing: Packing) -> Kind:
    """What is alike in all visits that one comparison speaks for."""
    slot = None if run.planes is None else run.planes.slots[visit.number]
    tokens = any(group.tokens is not None for group in packing.going)
    layer = type(getattr(run.forward, "__self__", None))
    return layer, type(slot), tokens, run.site.mask_in(run.args, run.kwargs) is None


def _checked(run: LayerRun, visit: Visit, packing: Packing, call: Call) -> bool:
    if not packing.going or _kind(run, visit, packing) in call.verdicts:
        return True
    planes = run.planes
    return planes is not None and isinstance(planes.slots[visit.number], RowsKept)


def _compared(run: LayerRun, visit: Visit, need: Mask, packing: Packing, call: Call) -> Tensor:
    """The first packed visit of its kind, made twice: the dense one counts. Shape: [B, T, D].

    Some layers make masks or positions of their own, from lengths, which nobody can gather.
    """
    state, plane, kind = visit.state, visit.number + 1, _kind(run, visit, packing)
    twin = copy.copy(run)
    twin.planes = None if run.planes is None else run.planes.twin()
    packed = packed_visit(twin, state, plane, packing)
    dense = dense_visit(run, state, need, plane)
    apart = 0.0
    for group in packing.going:
        here, there = group.take(packed, -2), group.take(dense, -2)
        if group.real is not None:
            here, there = (part.flatten(0, 1)[group.real] for part in (here, there))
        apart = max(apart, _gap(here, there))
    call.verdicts[kind] = apart <= torch.finfo(dense.dtype).eps ** 0.5
    if not call.verdicts[kind]:
        warnings.warn(
            f"some tokens of {kind[0].__name__} alone give other states than all together (by "
            f"{apart:.2g} of the largest), so its visits compute all tokens.",
            stacklevel=2,
        )
    return dense


def _gap(here: Tensor, there: Tensor) -> float:
    """The largest difference, as a share of the largest value; the same nan is none."""
    apart = (here - there).abs().masked_fill(here.isnan() & there.isnan(), 0).max()
    return (apart / there.nan_to_num().abs().max().clamp(min=1e-30)).float().nan_to_num(1.0).item()
