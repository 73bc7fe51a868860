"""Executors: one visit of one layer, by whichever does least for it.

Contract: an executor is told which tokens go again and which plane they read and write. (1) It
writes that plane exactly once, for all T positions; (2) where a token does not go again it returns
its state unchanged. `dense_visit` computes all tokens and selects: the readable reference.
`packed_visit` (`packed.py`) computes those that go.
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor

from trol.depth.call import Call
from trol.depth.choosing import kind_of, packing_for
from trol.depth.compact import RowsKept
from trol.depth.layer_run import LayerRun
from trol.depth.packed import Packing, packed_visit
from trol.depth.policy import Visit
from trol.depth.roles import Mask
from trol.depth.selection import Group


def dense_visit(run: LayerRun, state: Tensor, need: Mask, plane: int) -> Tensor:
    """One visit by computing all tokens; those not in `need` keep their state."""
    visited = run.apply(state, plane)
    if isinstance(need, bool):
        return visited if need else state
    return torch.where(need[..., None], visited, state)


def make_visit(run: LayerRun, visit: Visit, need: Mask, call: Call, *, last: bool) -> Tensor:
    """One more visit. `last`: nobody goes again after it. Shape: [B, T, D]."""
    state, plane = visit.state, visit.number + 1
    packing = packing_for(run, visit, need, call, last=last)
    if packing is None:
        # What a token does not take weighs 0, but the gradient of that choice is made of it.
        shown = True if last and torch.is_grad_enabled() and isinstance(need, Tensor) else need
        out, packing = dense_visit(run, state, shown, plane), Packing.dense(state)
    elif _checked(run, visit, packing, call):
        out = packed_visit(run, state, plane, packing)
    else:
        out, packing = _compared(run, visit, need, packing, call)
    if call.recorder is not None:
        call.recorder.visit(visit.layer, need, state, packing)
    return out


def _checked(run: LayerRun, visit: Visit, packing: Packing, call: Call) -> bool:
    if not packing.going or kind_of(run, visit, packing) in call.verdicts:
        return True
    planes = run.planes
    return planes is not None and isinstance(planes.slots[visit.number], RowsKept)


def _compared(
    run: LayerRun, visit: Visit, need: Mask, packing: Packing, call: Call
) -> tuple[Tensor, Packing]:
    """The first packed visit of its kind, made twice: the dense one counts where they differ.

    Some layers make masks or positions of their own, from lengths, which nobody can gather.
    """
    state, plane, kind = visit.state, visit.number + 1, kind_of(run, visit, packing)
    assert run.planes is not None
    twin = copy.copy(run)
    twin.planes = run.planes.twin()
    dense = dense_visit(twin, state, need, plane)
    try:
        packed = packed_visit(run, state, plane, packing)
        apart = max(_apart(group, packed, dense) for group in packing.going)
        how = f"give other states than all together (by {apart:.2g} of the largest)"
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        packed, apart, how = dense, math.inf, f"cannot go through it ({error})"
    # Above rounding, which is a few eps, and below what a wrong mask or position does.
    call.verdicts[kind] = apart <= torch.finfo(dense.dtype).eps ** (2 / 3)
    if call.verdicts[kind]:
        return packed, packing
    call.verdicts[kind[1]] = False
    warnings.warn(
        f"some tokens of {kind[1].__name__} alone {how}, so its visits compute all tokens.",
        stacklevel=2,
    )
    run.planes.become(twin.planes)
    run.rest = twin.rest
    return dense, Packing.dense(state)


def _apart(group: Group, packed: Tensor, dense: Tensor) -> float:
    """The largest difference of a group's states, as a share of the largest of them."""
    here, there = group.take(packed, -2), group.take(dense, -2)
    if group.real is not None:
        here, there = (part.flatten(0, 1)[group.real] for part in (here, there))
    # Where both are nan they are alike.
    apart = (here - there).abs().masked_fill(here.isnan() & there.isnan(), 0).max()
    return (apart / there.nan_to_num().abs().max().clamp(min=1e-30)).float().nan_to_num(1.0).item()
