"""The visit loop, which asks after r visits to layer l whether a token goes again.

    x_0 = what enters layer l      x_r = layer_l(x_{r-1})      a_r = policy.again(l, r, x_r)
    out = sum_r w_r x_r            w_r = (1 - a_r) * prod_{j<r} a_j

Every method in trol runs through `traverse`; each visit is made by an executor (`executors.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trol.depth.call import Call
from trol.depth.executors import going_of, make_visit, nobody_goes
from trol.depth.holes import Holes
from trol.depth.layer_run import LayerRun
from trol.depth.planes import HOLES, LayerPlanes
from trol.depth.policy import Answer, Visit, mixture
from trol.depth.roles import Mask
from trol.errors import UsageError


def traverse(
    run: LayerRun, state: Tensor, layer: int, gate: nn.Module | None, call: Call
) -> Tensor:
    """Passes the tokens through layer `layer` as the policy says. Shape: [B, T, D], in and out."""
    policy, context, in_scope = call.policy, call.context, call.context.in_scope
    least, most = call.bounds.layers[layer]
    limit = max(most, 1)  # outside the scope every token visits once
    _prepare(run, layer, (least, limit), state.shape[1], call)
    if policy.translates and in_scope is not False:
        state = _entering(Visit(layer, 0, state, gate, context, run.cache), call)
    # Where every answer is 0 or 1, a token's state is its output once it goes no more.
    mixes = not policy.decides or torch.is_grad_enabled()
    # All go again there, whatever a_r is: then the policy need not answer before they do.
    later = mixes and in_scope is True and call.recorder is None and not policy.observes
    need: Mask = True
    left: list[tuple[Visit, Answer | None]] = []
    answers: list[Answer | None] = []
    for number in range(limit):
        visit = Visit(layer, number, state, gate, context, run.cache)
        if later and 0 < number < least:
            again = None
        else:
            again = _again(visit, most, call)
            goes = again > 0
            need = in_scope if 0 < number < least else goes if need is True else _and(need, goes)
        answers.append(again)
        if mixes and (again is None or isinstance(again, Tensor) or again != 1):
            left.append((visit, again))
        if number == 0 and run.holes is not None:
            run.holes.dig(need if run.digs else True, state)
        last = number + 1 == limit
        if need is True and call.recorder is None and not (last and number and call.last_only):
            state = run.apply(state, number + 1)
            continue
        going = going_of(visit, need, call, last=last)
        if nobody_goes(need, going) and not _must_run(run, number, need):
            break
        state = make_visit(run, visit, need, going, call, last=last)
    else:
        number = limit
    if run.planes is not None:
        run.planes.finish(number)
    if call.recorder is not None:
        call.recorder.answers(layer, answers, ended=number == limit)
    return _mixed(left, state, call)


def _mixed(left: list[tuple[Visit, Answer | None]], state: Tensor, call: Call) -> Tensor:
    """sum_r w_r x_r from behind: out_r = (1 - a_r) x_r + a_r out_{r+1}. Shape: [B, T, D]."""
    mix = call.policy.mix
    for visit, again in reversed(left):
        state = mix(visit, state) if again is None else mixture(visit.state, state, again)
    return state


def _and(need: Mask, more: Mask) -> Mask:
    if need is False or more is True:
        return need
    return more if need is True or more is False else need & more


def _entering(visit: Visit, call: Call) -> Tensor:
    """x_0 as the policy translates it in its scope. Shape: [B, T, D]."""
    in_scope = call.context.in_scope
    if call.recorder is not None:
        call.recorder.translated()
    own = call.policy.enter(visit)
    return own if isinstance(in_scope, bool) else torch.where(in_scope[..., None], own, visit.state)


def _prepare(run: LayerRun, layer: int, bounds: tuple[int, int], tokens: int, call: Call) -> None:
    (least, most), in_scope = bounds, call.context.in_scope
    if run.cache is None and most > 1 and isinstance(in_scope, Tensor):
        run.cache = call.scratch()
    if run.cache is not None:
        keep = call.keep and run.lasts
        run.planes = LayerPlanes(run.cache, layer, bounds=bounds, in_scope=in_scope, keep=keep)
    run.digs = least == 0 and call.policy.skipped_kv == "hole"
    if run.digs or (layer, HOLES) in getattr(run.cache, "planes", ()):
        run.holes = Holes(run.cache, layer, tokens)


def _again(visit: Visit, most: int, call: Call) -> Answer:
    """a_r of the policy in scope, a_r of the plain model outside it. Shape: [B, T]."""
    plain = 1.0 if visit.number == 0 else 0.0
    policy, in_scope = call.policy, call.context.in_scope
    if in_scope is False and not policy.observes:
        return plain
    own: Answer = 0.0
    if visit.number < most:
        own = policy.again(visit)
        shape = own.shape if isinstance(own, Tensor) else None
        if shape != visit.state.shape[:2] and not isinstance(own, int | float):
            raise UsageError(
                f"{policy.name} answered {type(own).__name__} of shape "
                f"{None if shape is None else list(shape)} at layer {visit.layer}; give one "
                f"number, or one for each token: a tensor of shape {list(visit.state.shape[:2])}."
            )
        if call.recorder is not None:
            call.recorder.looked(visit, policy.look_flops(visit))
    if in_scope is False:
        return plain
    if in_scope is True or (isinstance(own, float) and own == plain):
        return own
    return torch.where(in_scope, own, plain)


def _must_run(run: LayerRun, number: int, need: Mask) -> bool:
    """Whether the layer runs although nobody goes again: for the keys and values it leaves."""
    if not run.lasts or run.planes is None:
        return False
    # Somebody could have gone: whether others do in this chunk must not change what is left.
    possible = isinstance(need, Tensor)
    return number == 0 or possible or (run.planes.keep and run.planes.recurrent)
