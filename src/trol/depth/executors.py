"""Executors: one visit of one layer, by whichever does least for it.

Contract: an executor is told which tokens go and which plane they read and write. (1) It writes
that plane exactly once, for all T positions; (2) where a token does not go it returns its state
unchanged. The dense executor computes all tokens and selects: the readable reference. The
token-wise one (`token_wise.py`) has parts of the layer compute those that go; rows that a fixed
plan keeps out of a layer do not enter it (`compact.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trol.depth.call import Call
from trol.depth.compact import rows_alone, visit_alone
from trol.depth.layer_run import LayerRun
from trol.depth.policy import Visit
from trol.depth.roles import Mask
from trol.host.attending import Attending
from trol.host.token_wise import Going

WORTH = 10_000_000
"""FLOPs that gathering must leave out of a visit: as long as the operators that it takes."""

STRETCHES = 100_000_000
"""The same for attention in stretches, each of which is some operators."""

FEW = {"cpu": 8, "cuda": 128}
"""Tokens of a call from which on fewer take less time: products of less wait for the weights."""


def going_of(visit: Visit, need: Mask, call: Call, *, last: bool) -> Going | None:
    """Who goes, if that can be used and is not everybody.

    `last`: nobody goes again after this visit.
    """
    fixed = call.rows_going(visit) if isinstance(need, Tensor) and call.looks else None
    if fixed is not None:
        return Going.of_rows(fixed, visit.state)
    if last and visit.number and call.only_last_of(visit.layer):
        return Going.last(visit.state)
    return Going.of(need) if isinstance(need, Tensor) and call.looks else None


def nobody_goes(need: Mask, going: Going | None) -> bool:
    """Whether it is known that nobody makes the visit."""
    return need is False or (going is not None and not going.count)


def make_visit(
    run: LayerRun, visit: Visit, need: Mask, going: Going | None, call: Call, *, last: bool
) -> Tensor:
    """One more visit; `going` and `last` as in `going_of`. Shape: [B, T, D].

    Where nobody goes, the layer is entered for its keys and values alone.
    """
    state, plane = visit.state, visit.number + 1
    computed, stayed, left = state.shape[0] * state.shape[1], 0, 0
    rows = rows_alone(run, visit, call) if isinstance(need, Tensor) else None
    if rows is not None:
        computed = len(rows) * state.shape[1]
        out = visit_alone(run, state, plane, rows)
    elif nobody_goes(need, going) and call.looks and run.leave(state, plane):
        computed, left, out = 0, computed, state
    elif going is not None and _pays(going, visit, call):
        stayed, attending = going.staying, _attending(going, visit, call)
        visited = run.apply(state, plane, going, attending=attending)
        out = _selected(visited, state, need if going.count else False)
        if call.recorder is not None and attending is not None:
            call.recorder.spared_pairs(visit.layer, attending.spared)
    else:
        # What a token does not take weighs 0, but the gradient of that choice is made of it.
        shown = True if last and torch.is_grad_enabled() and isinstance(need, Tensor) else need
        out = _selected(run.apply(state, plane), state, shown)
    if call.recorder is not None:
        call.recorder.visit(visit.layer, need, state, computed, stayed=stayed, left=left)
    return out


def _selected(visited: Tensor, state: Tensor, need: Mask) -> Tensor:
    """What was visited where it is in `need`, and the state elsewhere. Shape: [B, T, D]."""
    if isinstance(need, bool):
        return visited if need else state
    return torch.where(need[..., None], visited, state)


def _pays(going: Going, visit: Visit, call: Call) -> bool:
    """Whether the token-wise executor is taken: where it can be, and saves more than it takes."""
    if call.executor == "token-wise" or not call.parts:
        return call.parts
    device, total = visit.state.device, going.staying + going.count
    saved = going.staying * call.costs().token_wise[visit.layer]
    return saved >= WORTH and total >= FEW.get(device.type, FEW["cuda"])


def _attending(going: Going, visit: Visit, call: Call) -> Attending | None:
    """Attention of those that go alone, where that pays: not on a device that launches kernels."""
    cost = call.costs().layers[visit.layer]
    if visit.state.device.type != "cpu" or cost is None:
        return None
    saved = going.staying * going.shape[1] * cost.per_key // 2
    return Attending(going) if saved >= STRETCHES else None
