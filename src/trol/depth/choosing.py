"""Choosing who enters a layer: everybody, or those alone whose output or keys somebody needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from trol.depth.call import Call, Kind
from trol.depth.compact import RowsKept
from trol.depth.layer_run import LayerRun
from trol.depth.pace import CALL, pace_of
from trol.depth.packed import Packing, is_packable, packing_of
from trol.depth.planes import LayerPlanes
from trol.depth.policy import Visit
from trol.depth.roles import Mask
from trol.depth.selection import Group, crowd_of, everybody
from trol.depth.sides import masked, understood
from trol.host.cache import is_growing_and_empty
from trol.host.classes import original_class


def packing_for(
    run: LayerRun, visit: Visit, need: Mask, call: Call, *, last: bool
) -> Packing | None:
    """Who enters the layer, where that is not everybody; None for the dense executor."""
    fixed = call.rows_going(visit)
    kept = _kept_already(run, visit, fixed)
    if kept is not None or not call.packs or (visit.number == 0 and need is True):
        return kept
    only_last = last and visit.number > 0 and call.only_last_of(visit.layer) and fixed is None
    real = None if fixed is not None else call.real(visit.state)  # rows kept are kept whole
    going = _going(visit.state, need, real, only_last=only_last)
    if going is True or not _could_pay(visit, going, call):
        return None
    planes = _planes_of(run, visit, call)
    slot = planes.slots[visit.number]
    owning: Mask = planes.in_scope if visit.number else True
    fresh = is_growing_and_empty(slot)
    # Rows that a plan keeps out own nothing where nobody else can ever ask: in a slot of their own.
    if (fixed is not None and fresh) or (run.digs and not visit.number):
        owning = need
    if not going.any():
        return _nobody(run, visit.state, owning) if is_packable(slot) else None
    known = call.masks_gather and understood(run, *visit.state.shape[:2]) and masked(run, slot)
    if not (known and is_packable(slot)):
        return None
    packing = packing_of(slot, going, _without_padding(owning, real), visit.state.device)
    packing = replace(
        packing,
        keep=fixed is not None and fresh and len(packing.going) == 1,
        among=run.digs and not visit.number and fresh and _in_order(run, packing),
    )
    fails = kind_of(run, visit, packing)[1] in call.verdicts
    return packing if not fails and _pays(packing, visit, call) else None


def _going(
    state: Tensor, need: Mask, real: Tensor | None, *, only_last: bool
) -> Tensor | Literal[True]:
    """Who goes through, of whom something is read; True for everybody. Shape: [B, T]."""
    if need is True and real is None and not only_last:
        return True
    going = need if isinstance(need, Tensor) else torch.full(state.shape[:2], need)
    if real is not None:
        going = going.to(real.device) & real
    if only_last:
        last = going.shape[1] - 1
        going = going & (torch.arange(last + 1, device=going.device) == last)
    return going


def _without_padding(owning: Mask, real: Tensor | None) -> Mask:
    """Nobody sees the keys of padding."""
    if real is None or owning is False:
        return owning
    return real if owning is True else owning.to(real.device) & real


def _kept_already(run: LayerRun, visit: Visit, fixed: tuple[bool, ...] | None) -> Packing | None:
    """The rows of a plane that holds those alone, if the policy in force still means them."""
    slot = None if run.planes is None else run.planes.slots[visit.number]
    if fixed is None or not isinstance(slot, RowsKept):
        return None
    slot.check([row for row, goes in enumerate(fixed) if goes])
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
    if owning is True or (run.digs and not understood(run, rows, tokens)):
        return Packing([], [everybody(rows, tokens)])
    if not understood(run, rows, tokens):
        return None
    left = owning if isinstance(owning, Tensor) else torch.zeros(rows, tokens, dtype=torch.bool)
    if run.digs:  # which nobody will see; their form alone is wanted
        left = torch.zeros_like(left)
        left[:, 0] = True
    return Packing([], crowd_of(left, state.device))


def _in_order(run: LayerRun, packing: Packing) -> bool:
    """Whether what fills short rows up, at their ends, is hidden from the tokens before it."""
    if run.site.mask_in(run.args, run.kwargs) is None:
        return bool(run.site.causal)
    return all(group.real is None for group in packing.going)


def _could_pay(visit: Visit, going: Tensor, call: Call) -> bool:
    """Whether leaving out those who do not go could save time, were all else for nothing."""
    cost = call.costs().layers[visit.layer]
    if call.executor == "packed" or cost is None:
        return call.executor == "packed"
    count = int(going.sum())
    saved = cost.flops(going.numel() - count, step=going.shape[1])
    return not count or pace_of(visit.state.device, visit.state.dtype).pays(saved, CALL)


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
    return pace_of(visit.state.device, visit.state.dtype).pays(saved, calls * CALL)


def kind_of(run: LayerRun, visit: Visit, packing: Packing) -> Kind:
    """What is alike in all visits that one comparison speaks for."""
    slot = None if run.planes is None else run.planes.slots[visit.number]
    tokens = any(group.tokens is not None for group in packing.going)
    known = original_class(run.layer)  # a made-up class cannot be pickled
    return visit.layer, known, type(slot), tokens, run.site.mask_in(run.args, run.kwargs) is None
