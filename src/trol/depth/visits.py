"""The visit loop, which asks after r visits to layer l whether a token goes again.

    x_0 = what enters layer l      x_r = layer_l(x_{r-1})      a_r = policy.again(l, r, x_r)
    out = sum_r w_r x_r            w_r = (1 - a_r) * prod_{j<r} a_j

Every method in trol runs through `traverse`. An *executor* makes one visit: it is called with the
tokens that go again and the plane they read and write. Contract: (1) it writes that plane exactly
once, for all T positions; (2) where a token does not go again it returns its state unchanged.
`dense_visit` computes all tokens and selects: the readable reference; `packed` has the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trol.depth.call import Call
from trol.depth.families import LayerSite
from trol.depth.holes import Holes
from trol.depth.packed import keys_only, last_visit
from trol.depth.planes import LayerPlanes
from trol.depth.policy import Answer, Visit
from trol.depth.roles import Mask

Forward = Callable[..., Any]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer takes beside the hidden states."""


class LayerRun:
    """One layer, one call: applies the host's own layer as often as the visit loop asks."""

    def __init__(
        self, forward: Forward, site: LayerSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.forward, self.site, self.args, self.kwargs = forward, site, args, kwargs
        self.cache = site.cache_in(args, kwargs)
        self.planes: LayerPlanes | None = None
        self.holes: Holes | None = None
        self.rest: tuple[Any, ...] | None = None
        self.applied = 0

    def apply(self, state: Tensor, plane: int) -> Tensor:
        """layer_l(state), reading and writing plane `plane`. Shape: [B, T, D], in and out."""
        args, kwargs, cache = self.args, self.kwargs, None
        if self.planes is not None:
            cache = self.planes.opened(plane)
        if self.holes is not None:
            args, kwargs = self.site.with_cache(args, kwargs, cache)
            args, kwargs = self.holes.shown_in(args, kwargs, self.site, state)
        out = self.call(state, (args, kwargs), cache)
        self.applied += 1
        if self.planes is not None:
            self.planes.close()
        return out

    def call(self, state: Tensor, inputs: Inputs, cache: Any) -> Tensor:
        """The host's layer once, on these side inputs and, if not None, this cache."""
        args, kwargs = inputs
        if cache is not None:
            args, kwargs = self.site.with_cache(args, kwargs, cache)
        out = self.forward(state, *args, **kwargs)
        if not isinstance(out, tuple):
            return out
        if self.rest is None:  # what comes beside the hidden states is the first visit's
            self.rest = out[1:]
        return out[0]

    def wrap(self, state: Tensor) -> Any:
        """The layer's output in the form that its family returns; the layer has run."""
        return state if self.rest is None else (state, *self.rest)


def dense_visit(run: LayerRun, state: Tensor, need: Mask, plane: int) -> Tensor:
    """One visit by computing all tokens; those not in `need` keep their state."""
    visited = run.apply(state, plane)
    if isinstance(need, bool):
        return visited if need else state
    return torch.where(need[..., None], visited, state)


def traverse(
    run: LayerRun, state: Tensor, layer: int, gate: nn.Module | None, call: Call
) -> Tensor:
    """Passes the tokens through layer `layer` as the policy says. Shape: [B, T, D], in and out."""
    least, most = call.policy.bounds(layer)
    limit = max(most, 1)  # outside the scope every token visits once
    _prepare(run, layer, limit, state.shape[1], call)
    state = _entering(Visit(layer, 0, state, gate, call.context, run.cache), call)
    out, alive, made = None, 1.0, []
    visited = 0
    for number in range(limit + 1):
        visit = Visit(layer, number, state, gate, call.context, run.cache)
        again = _again(visit, call) if number < limit else 0.0
        weight = alive * (1 - again)
        out = _add(out, weight, state)
        made.append(weight)
        alive = alive * again
        need = call.in_scope if number < least and number > 0 else _positive(alive)
        if number == 0 and run.holes is not None:
            run.holes.dig(need, state)
        if number == limit or (_nobody(need, call) and not _must_run(run, number, need)):
            break
        visited = number + 1
        state = _visit(run, visit, need, call, last=visited == limit)
    if run.planes is not None:
        run.planes.finish(visited)
    if call.recorder is not None:
        call.recorder.weights(layer, made)
    assert out is not None  # alive reaches 0, so some weight was not 0
    return out.to(state.dtype)


def _visit(run: LayerRun, visit: Visit, need: Mask, call: Call, *, last: bool) -> Tensor:
    """One more visit, by the executor that does least for it. Shape: [B, T, D]."""
    state, plane = visit.state, visit.number + 1
    if call.packs and _nobody(need, call) and keys_only(run, state, visit.layer, plane):
        if call.recorder is not None:
            call.recorder.keys(visit.layer, state)
        return state
    packed = None
    if last and plane > 1 and need is True and call.only_last_of(visit.layer) and not run.holes:
        packed = last_visit(run, state, visit.layer, plane)
    # What a token does not take weighs 0, but it is what the gradient of that choice is made of.
    shown = True if last and torch.is_grad_enabled() and isinstance(need, Tensor) else need
    state = dense_visit(run, state, shown, plane) if packed is None else packed
    if call.recorder is not None:
        call.recorder.visit(visit.layer, need, state)
    return state


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
        keep = call.keep and run.cache is run.site.cache_in(run.args, run.kwargs)
        run.planes = LayerPlanes(run.cache, layer, most=limit, in_scope=call.in_scope, keep=keep)
    if call.policy.skipped_kv == "hole" and call.policy.bounds(layer).least == 0:
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
    if run.cache is None or run.planes is None:
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
