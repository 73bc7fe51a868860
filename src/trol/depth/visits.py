"""The visit loop, which asks after r visits to layer l whether a token goes again.

    x_0 = what enters layer l      x_r = layer_l(x_{r-1})      a_r = policy.again(l, r, x_r)
    out = sum_r w_r x_r            w_r = (1 - a_r) * prod_{j<r} a_j

Every method in trol runs through `traverse`; each visit is made by an executor (`executors.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trol.depth.call import Call
from trol.depth.executors import make_visit
from trol.depth.holes import Holes
from trol.depth.layer_run import LayerRun
from trol.depth.planes import HOLES, LayerPlanes
from trol.depth.policy import Answer, Visit
from trol.depth.roles import Mask


def traverse(
    run: LayerRun, state: Tensor, layer: int, gate: nn.Module | None, call: Call
) -> Tensor:
    """Passes the tokens through layer `layer` as the policy says. Shape: [B, T, D], in and out."""
    least, most = call.policy.bounds(layer)
    limit = max(most, 1)  # outside the scope every token visits once
    _prepare(run, layer, limit, state.shape[1], call)
    state = _entering(Visit(layer, 0, state, gate, call.context, run.cache), call)
    # Where every answer is 0 or 1, a token's state is its output once it goes no more.
    mixes = not call.policy.decides or torch.is_grad_enabled()
    out, alive, made = None, 1.0, []
    visited = 0
    for number in range(limit + 1):
        visit = Visit(layer, number, state, gate, call.context, run.cache)
        again = _again(visit, call) if number < limit else 0.0
        weight = alive * (1 - again)
        out = _add(out, weight, state) if mixes else state
        made.append(weight)
        alive = alive * again
        need = call.in_scope if number < least and number > 0 else _positive(alive)
        if number == 0 and run.holes is not None:
            run.holes.dig(need if run.digs else True, state)
        if number == limit or (_nobody(need, call) and not _must_run(run, number, need)):
            break
        visited = number + 1
        state = make_visit(run, visit, need, call, last=visited == limit)
    if run.planes is not None:
        run.planes.finish(visited)
    if call.recorder is not None:
        call.recorder.weights(layer, made)
        call.recorder.spared(run.spared)
    assert out is not None  # alive reaches 0, so some weight was not 0
    return out.to(state.dtype)


def _nobody(need: Mask, call: Call) -> bool:
    """Whether no token goes again. Tensors are looked at only where that may wait for a device."""
    if isinstance(need, bool):
        return not need
    return call.packs and not bool(need.any())


def _entering(visit: Visit, call: Call) -> Tensor:
    """x_0: the state itself, unless the policy translates the states in its scope."""
    if not call.policy.translates or call.in_scope is False:
        return visit.state
    if call.recorder is not None:
        call.recorder.translated()
    own = call.policy.enter(visit)
    if isinstance(call.in_scope, bool):
        return own
    return torch.where(call.in_scope[..., None], own, visit.state)


def _prepare(run: LayerRun, layer: int, limit: int, tokens: int, call: Call) -> None:
    partial = isinstance(call.in_scope, Tensor)
    if run.cache is None and limit > 1 and partial:
        run.cache = call.scratch()
    if run.cache is not None:
        keep = call.keep and run.lasts
        run.planes = LayerPlanes(run.cache, layer, most=limit, in_scope=call.in_scope, keep=keep)
    run.digs = call.policy.skipped_kv == "hole" and call.policy.bounds(layer).least == 0
    if run.digs or (layer, HOLES) in getattr(run.cache, "planes", ()):
        run.holes = Holes(run.cache, layer, tokens)


def _again(visit: Visit, call: Call) -> Answer:
    """a_r of the policy in scope, a_r of the plain model outside it. Shape: [B, T]."""
    plain = 1.0 if visit.number == 0 else 0.0
    if call.in_scope is False and not call.policy.observes:
        return plain
    own: Answer = 0.0
    if visit.number < call.policy.bounds(visit.layer).most:
        own = call.policy.again(visit)
        if call.recorder is not None:
            call.recorder.looked(visit, call.policy.look_flops(visit))
    if call.in_scope is False:
        return plain
    if isinstance(call.in_scope, bool) or (isinstance(own, float) and own == plain):
        return own
    return torch.where(call.in_scope, own, plain)


def _must_run(run: LayerRun, number: int, need: Mask) -> bool:
    """Whether the layer runs although nobody goes again: for the keys and values it leaves."""
    if not run.lasts or run.planes is None:
        return False
    # Somebody could have gone: whether others do in this chunk must not change what is left.
    possible = isinstance(need, Tensor)
    return number == 0 or possible or (run.planes.recurrent and run.planes.keep)


def _add(out: Tensor | None, weight: Answer, state: Tensor) -> Tensor | None:
    if isinstance(weight, (int, float)):
        if weight == 0:
            return out
        term = state if weight == 1 else weight * state
    else:
        term = weight[..., None] * state  # float32 weights: the mixture is made in float32
    return term if out is None else out + term


def _positive(alive: Answer) -> Mask:
    return alive > 0
