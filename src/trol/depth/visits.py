"""The visit loop, which asks after r visits to layer l whether a token goes again.

    x_0 = what enters layer l      x_r = layer_l(x_{r-1})      a_r = policy.again(l, r, x_r)
    out = sum_r w_r x_r            w_r = (1 - a_r) * prod_{j<r} a_j

Every method in trol runs through `traverse`. Each visit is made by `make_visit`: it writes the keys
and values of all T positions into one plane, exactly once, and a token that does not go keeps its
state. *Dense* computes all tokens and selects, and is the readable reference; *token-wise*
(`trol.execution.token_wise`) has the parts of the layer compute the tokens that go; *rows*
(`trol.execution.rows`) lets only the rows enter the layer that a fixed plan sends there.
"""

import torch
from jaxtyping import Integer
from torch import Tensor, nn

from trol.axes import States
from trol.depth.call import Call
from trol.depth.layer_run import LayerRun
from trol.depth.planes import HOLES, Holes, LayerPlanes, PlanedCache, install_planes
from trol.depth.policy import AbstractPolicy, Answer, StackBounds, Visit, mixture
from trol.depth.roles import Mask
from trol.errors import UsageError
from trol.execution.rows import RowSubsetLayer, hold_rows, rows_are_known, select_rows
from trol.execution.token_wise import VisitingQueries, VisitingTokens
from trol.host.cache import is_growing_and_empty


def traverse(
    run: LayerRun, state: States, layer: int, gate: nn.Module | None, call: Call
) -> States:
    """Passes the tokens through layer `layer` as the policy says. Shape: [B, T, D], in and out."""
    policy, context, in_scope = call.policy, call.context, call.context.in_scope
    least, most = call.bounds.layers[layer]
    limit = max(most, 1)  # a layer that tokens in scope skip is visited once outside the scope
    _prepare(run, layer, (least, limit), state.shape[1], call)
    if policy.translates and in_scope is not False:
        state = _entering(Visit(layer, 0, state, gate, context, run.cache), call)
    # Where every answer is 0 or 1, a token that stops keeps its state as its output: no mixing.
    mixes = not policy.decides or torch.is_grad_enabled()
    # Below `least`, all tokens go again whatever a_r is, so the answer can wait for `mix`.
    answers_can_wait = mixes and in_scope is True and call.recorder is None and not policy.observes
    need: Mask = True
    to_mix: list[tuple[Visit, Answer | None]] = []
    answers: list[Answer | None] = []
    for number in range(limit):
        visit = Visit(layer, number, state, gate, context, run.cache)
        if answers_can_wait and 0 < number < least:
            again = None
        else:
            again = _again(visit, most, call)
            goes = again > 0
            need = in_scope if 0 < number < least else goes if need is True else _and(need, goes)
        answers.append(again)
        if mixes and (again is None or isinstance(again, Tensor) or again != 1):
            to_mix.append((visit, again))
        if number == 0 and run.holes is not None:
            run.holes.mark_skipped(need if run.leaves_holes else True, state)
        last = number + 1 == limit
        # Of the last layer's last visit, a prompt may need one token alone (`tokens_going`).
        may_be_few = last and number > 0 and call.asks_last_only is not None
        if need is True and call.recorder is None and not may_be_few:
            state = run.apply(state, number + 1)
            continue
        going = tokens_going(visit, need, call, last=last)
        if none_go(need, going) and not _must_run(run, number, need):
            break
        state = make_visit(run, visit, need, going, call, last=last)
    else:
        number = limit
    if run.planes is not None:
        run.planes.commit(number)
    if call.recorder is not None:
        call.recorder.answers(layer, answers, ended=number == limit)
    return _mixed(to_mix, state, call)


def _prepare(run: LayerRun, layer: int, bounds: tuple[int, int], tokens: int, call: Call) -> None:
    (least, most), in_scope = bounds, call.context.in_scope
    if run.cache is None and most > 1 and isinstance(in_scope, Tensor):
        run.cache = call.scratch()
    if run.cache is not None:
        keep = call.keep and run.persists
        run.planes = LayerPlanes(run.cache, layer, bounds=bounds, in_scope=in_scope, keep=keep)
    run.leaves_holes = least == 0 and call.policy.skipped_kv == "hole"
    if run.leaves_holes or (layer, HOLES) in getattr(run.cache, "planes", ()):
        run.holes = Holes(run.cache, layer, tokens)


def _entering(visit: Visit, call: Call) -> States:
    """x_0 as the policy translates it in its scope. Shape: [B, T, D]."""
    in_scope = call.context.in_scope
    if call.recorder is not None:
        call.recorder.translated()
    own = call.policy.enter(visit)
    return own if isinstance(in_scope, bool) else torch.where(in_scope[..., None], own, visit.state)


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


def _and(need: Mask, more: Mask) -> Mask:
    if need is False or more is True:
        return need
    return more if need is True or more is False else need & more


def _must_run(run: LayerRun, number: int, need: Mask) -> bool:
    """Whether the layer runs although no token goes: for the keys and values that it leaves."""
    if not run.persists or run.planes is None:
        return False
    # Some token could have gone: the keys left must not depend on which tokens of a chunk do.
    possible = isinstance(need, Tensor)
    return number == 0 or possible or (run.planes.keep and run.planes.recurrent)


def _mixed(to_mix: list[tuple[Visit, Answer | None]], state: States, call: Call) -> States:
    """sum_r w_r x_r from behind: out_r = (1 - a_r) x_r + a_r out_{r+1}. Shape: [B, T, D]."""
    mix = call.policy.mix
    for visit, again in reversed(to_mix):
        state = mix(visit, state) if again is None else mixture(visit.state, state, again)
    return state


def tokens_going(visit: Visit, need: Mask, call: Call, *, last: bool) -> VisitingTokens | None:
    """The tokens that make this visit; None where all do, or the executor cannot leave any out.

    `last`: no token goes again after this visit.
    """
    fixed = call.rows_going(visit) if isinstance(need, Tensor) and call.looks else None
    if fixed is not None:
        return VisitingTokens.from_rows(fixed, visit.state)
    if last and visit.number and call.only_last_of(visit.layer):
        return VisitingTokens.last_of_rows(visit.state)
    return VisitingTokens.from_mask(need) if isinstance(need, Tensor) and call.looks else None


def none_go(need: Mask, going: VisitingTokens | None) -> bool:
    """Whether it is known that no token makes the visit."""
    return need is False or (going is not None and not going.count)


def make_visit(
    run: LayerRun, visit: Visit, need: Mask, going: VisitingTokens | None, call: Call, *, last: bool
) -> States:
    """One more visit; `going` and `last` as in `tokens_going`. Shape: [B, T, D].

    Where no token goes, the layer runs up to its keys and values only.
    """
    state, plane = visit.state, visit.number + 1
    computed, stayed, keys_only = state.shape[0] * state.shape[1], 0, 0
    rows = rows_alone(run, visit, call) if isinstance(need, Tensor) else None
    if rows is not None:
        computed = len(rows) * state.shape[1]
        out = visit_alone(run, state, plane, rows)
    elif none_go(need, going) and call.looks and run.leave(state, plane):
        computed, keys_only, out = 0, computed, state
    elif going is not None and _is_worth(going, visit, call):
        stayed, attending = going.staying, _attending(going, visit, call)
        visited = run.apply(state, plane, going, attending=attending)
        out = _selected(visited, state, need if going.count else False)
        if call.recorder is not None and attending is not None:
            call.recorder.skipped_pairs(visit.layer, attending.skipped_pairs)
    else:
        # A skipped visit weighs 0, but the gradient of the choice to skip needs its output.
        shown = True if last and torch.is_grad_enabled() and isinstance(need, Tensor) else need
        out = _selected(run.apply(state, plane), state, shown)
    if call.recorder is not None:
        call.recorder.visit(visit.layer, need, state, computed, stayed=stayed, keys_only=keys_only)
    return out


def _selected(visited: States, state: States, need: Mask) -> States:
    """`visited` for the tokens in `need`, `state` for the others. Shape: [B, T, D]."""
    if isinstance(need, bool):
        return visited if need else state
    return torch.where(need[..., None], visited, state)


LEAST_SAVED = 10_000_000
"""FLOPs that a token-wise visit must save: gathering its tokens takes about as long."""


LEAST_SAVED_ATTENTION = 100_000_000
"""FLOPs that attention over some queries must save: it runs in stretches of several operators."""


LEAST_TOKENS = {"cpu": 8, "cuda": 128}
"""Fewest tokens of a call for which fewer take less time: below, products wait for the weights."""


def _is_worth(going: VisitingTokens, visit: Visit, call: Call) -> bool:
    """Whether the token-wise executor can run, and saves more than gathering takes."""
    if call.executor == "token-wise" or not call.parts:
        return call.parts
    device, total = visit.state.device, going.staying + going.count
    saved = going.staying * call.costs().token_wise[visit.layer]
    return saved >= LEAST_SAVED and total >= LEAST_TOKENS.get(device.type, LEAST_TOKENS["cuda"])


def _attending(going: VisitingTokens, visit: Visit, call: Call) -> VisitingQueries | None:
    """Attention for the queries that go, where it saves time: on CPUs, for long inputs."""
    cost = call.costs().layers[visit.layer]
    if visit.state.device.type != "cpu" or cost is None:
        return None
    saved = going.staying * going.shape[1] * cost.per_key // 2
    return VisitingQueries(going) if saved >= LEAST_SAVED_ATTENTION else None


def rows_alone(run: LayerRun, visit: Visit, call: Call) -> Integer[Tensor, " rows"] | None:
    """The rows that a plan sends through this visit alone; None where all rows go. Shape: [b].

    Raises:
        HostError: the cache holds other rows in this layer.
    """
    fixed = call.rows_going(visit)
    if fixed is None:
        return None
    slot = None if run.planes is None else run.planes.slots[visit.number]
    going = [row for row, goes in enumerate(fixed) if goes]
    if isinstance(slot, RowSubsetLayer):
        slot.check(going)
        return slot.held_rows
    fresh = slot is None or is_growing_and_empty(slot)
    if not (call.looks and fresh and _rows_of_all_inputs_known(run, len(fixed))):
        return None
    rows, device = torch.tensor(going), visit.state.device
    if slot is not None:
        install_planes(run.cache)  # so that `check_rows` sees the next policy
        hold_rows(slot, rows, len(fixed), device)
    return rows.to(device)


def visit_alone(run: LayerRun, state: States, plane: int, rows: Integer[Tensor, " rows"]) -> States:
    """One visit by some rows; the others keep their state. Shape: [B, T, D], rows [b]."""
    args, kwargs = run.inputs(state)
    batch = len(state)
    given = {name: select_rows(one, name, rows, batch) for name, one in kwargs.items()}
    names = run.signature.names[: len(args)]
    placed = [select_rows(one, name, rows, batch) for name, one in zip(names, args, strict=True)]
    visited = run.apply(state.index_select(0, rows), plane, inputs=(tuple(placed), given))
    return state.index_copy(0, rows, visited)


def _rows_of_all_inputs_known(run: LayerRun, batch: int) -> bool:
    """Whether each input of the layer beside its states says which part belongs to which row."""
    args, kwargs = run.given
    placed = zip(run.signature.names[: len(args)], args, strict=True)
    return all(rows_are_known(value, name, batch) for name, value in [*placed, *kwargs.items()])


def check_rows(
    cache: PlanedCache, policy: AbstractPolicy, bounds: StackBounds, *, everywhere: bool
) -> None:
    """Raises `HostError` where `policy` sends rows to a layer whose keys the cache does not hold.

    `everywhere`: whether its scope is `all`.
    """
    places = [((layer, 1), slot) for layer, slot in enumerate(cache.layers)]
    for (layer, plane), slot in [*places, *cache.planes.items()]:
        if not isinstance(slot, RowSubsetLayer):
            continue
        most = bounds.layers[layer].most
        if most:  # else the layer is left alone
            fixed = policy.rows_going(layer, plane - 1, slot.batch) if everywhere else None
            going = [most >= plane] * slot.batch if fixed is None else fixed
            slot.check([row for row, goes in enumerate(going) if goes])
