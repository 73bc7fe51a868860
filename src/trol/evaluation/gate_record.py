"""What the gates of a mixer said under full traversal, and what leaving out small ones would cost.

    again_l = (N - 1) T (share_l visit_l + (1 - share_l) keys_l)      0 where nobody goes again
    cost = (sum_l visit_l T + again_l) / sum_l visit_l T

share_l is the part of the tokens in scope whose gate on layer l is above its tau; the others leave
keys and values. So 1 is the plain model's cost, and full traversal with N passes costs about N.

The search for thresholds of a mixer: which second visits the answers can do without.

Every setting is judged by answering questions under it. Layers are tried alone, then left out
together, those that do least harm first; then one threshold is raised for the layers that stay;
then each layer is tried on its own again.

What reading a prompt takes under several policies, side by side in one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, attached, depth, trace
from trol.depth.attachment import cost_of
from trol.depth.trace import StackCost
from trol.errors import HostError
from trol.evaluation.tasks import Item, answers, batches, fitted, prompts
from trol.evaluation.timing import interleaved, ratio_and_spread, time_generate
from trol.policies.mixer import TrolMixer

Taus = tuple[float | None, ...]
"""A threshold for each layer; None where nobody goes again."""

KEYS_SHARE = 1 / 6
"""What leaving keys and values is taken to cost, as a share of a visit, where FLOPs are not
known: four square matrices read the state in attention, two or three of four times their size
after it, and keys and values are two of the first."""


@dataclass(frozen=True)
class GateRecord:
    """The gates of M tokens in scope on L layers."""

    least: Tensor
    """The smallest gate up to each second or later visit: a token makes the visit if it is above
    tau. Shape: [L, N - 1, M]."""
    answers: tuple[str, ...]
    """What was answered under full traversal."""
    visit: tuple[float, ...]
    """Cost of a visit of layer l, for one token."""
    keys: tuple[float, ...]
    """Cost of leaving keys and values on layer l, for one token."""
    flops: bool
    """Whether these are FLOPs; otherwise they are shares of a visit."""

    def shares(self, taus: Taus) -> list[float]:
        """Of the second and later visits of each layer, the share that is made: [L]."""
        return [
            0.0 if tau is None else 1.0 if tau == 0 else (gates > tau).float().mean().item()
            for tau, gates in zip(taus, self.least, strict=True)
        ]

    def again(self, taus: Taus) -> list[float]:
        """What second and later visits of each layer cost, per token: [L]."""
        later = self.least.shape[1]
        each = zip(taus, self.shares(taus), self.visit, self.keys, strict=True)
        return [
            0.0 if tau is None else later * (share * visit + (1 - share) * keys)
            for tau, share, visit, keys in each
        ]

    def cost(self, taus: Taus) -> float:
        """The cost under these thresholds, of the plain model's."""
        return 1 + sum(self.again(taus)) / sum(self.visit)


def at(mixer: TrolMixer, taus: Taus) -> TrolMixer:
    """The same mixer at other thresholds."""
    tau = 0.0 if all(one == 0 for one in taus) else list(taus)
    return TrolMixer(**{**mixer.settings(), "tau": tau})


def gates_recorded(
    model: Any, processor: Any, items: Sequence[Item], mixer: TrolMixer, *, new_tokens: int
) -> GateRecord:
    """Answers the questions under full traversal, and keeps the gates of the tokens in scope.

    Raises:
        HostError: no token is in scope.
    """
    given: list[str] = []
    parts: list[Tensor] = []
    lengths = []
    with depth(model, at(mixer, (0.0,))):
        for some in batches(items):
            with trace(model) as seen:
                given += answers(model, processor, some, new_tokens=new_tokens)
            parts.append(_least(seen.weights, _in_scope(seen), mixer.passes))
            lengths.append(seen.real.sum().item() / len(some))
    least = torch.cat(parts, dim=-1)
    if not least.shape[-1]:
        raise HostError(
            f"no token of these questions is in the scope {mixer.scope!r}, so no gate is asked."
        )
    tokens = round(sum(lengths) / len(lengths))
    visit, keys, known = _unit_costs(cost_of(model), tokens)
    return GateRecord(least, tuple(given), visit, keys, known)


def visits_made(
    model: Any, processor: Any, items: Sequence[Item], mixer: TrolMixer, *, new_tokens: int
) -> Tensor:
    """How many second and later visits each layer makes in answering these. Shape: [L]."""
    layers = attached(model)[1].depth_layers
    made = torch.zeros(layers, dtype=torch.long)
    with depth(model, mixer):
        for some in batches(items):
            with trace(model) as seen:
                answers(model, processor, some, new_tokens=new_tokens)
            made += ((seen.visits - 1).clamp(min=0) * seen.real).sum((1, 2))
    return made


def _in_scope(seen: Any) -> Tensor:
    """Which tokens could go again: those that did, at tau = 0. Shape: [B, T]."""
    return (seen.visits > 1).any(0) & seen.real


def _least(weights: Tensor, chosen: Tensor, passes: int) -> Tensor:
    """min_{j <= r} g(x_j), from w_r = (1 - g(x_r)) prod_{j < r} g(x_j). Shape: [L, N - 1, M]."""
    alive = torch.ones_like(weights[:, 0][:, chosen])
    least, found = alive, []
    for visit in range(1, passes):
        gate = 1 - weights[:, visit][:, chosen] / alive.clamp(min=1e-12)
        least = torch.minimum(least, gate)
        found.append(least)
        alive = alive * gate
    return torch.stack(found, dim=1)


def _unit_costs(stack: StackCost, tokens: int) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Cost of a visit and of keys and values for each layer; and whether these are FLOPs."""
    visit, keys = [], []
    for layer, gate in zip(stack.layers, stack.gate_per_token, strict=True):
        if layer is None or layer.keys_per_token is None:
            count = len(stack.layers)
            return (1.0,) * count, (KEYS_SHARE,) * count, False
        one = layer.flops(tokens, step=tokens) / tokens
        visit.append(float(one))
        keys.append(float(layer.keys_per_token + gate))
    return tuple(visit), tuple(keys), True


GRID = (0.0, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, *(n / 10 for n in range(2, 10)), 0.95, 0.99)
"""Thresholds that are tried: even where gates of small models lie, and fine near 0, where those of
the published ones do."""

WORTH = 0.9
"""A threshold is tried on one layer if it makes at most this share of the visits left there."""


HALFWAY = 0.5
"""What is judged before a layer is left out: gates below it are mostly shut."""


@dataclass
class Trial:
    """Thresholds tried on one set of questions, each setting once."""

    model: Any
    processor: Any
    items: Sequence[Item]
    mixer: TrolMixer
    new_tokens: int
    full: Sequence[str]
    passed: Callable[[], None]
    found: dict[Taus, int] = field(default_factory=dict)
    """Thresholds -> answers that differ from those of full traversal."""

    def faults(self, taus: Taus) -> int:
        """How many answers differ."""
        if taus not in self.found:
            with depth(self.model, at(self.mixer, taus)):
                given = answers(self.model, self.processor, self.items, new_tokens=self.new_tokens)
            self.found[taus] = sum(a != b for a, b in zip(given, self.full, strict=True))
            self.passed()
        return self.found[taus]


def search(trial: Trial, record: GateRecord, allowed: int) -> list[Taus]:
    """Settings from full traversal to the cheapest found that changes at most `allowed` answers.

    Each leaves out all that the one before it leaves out: a layer more, from the least harmful on.
    """
    full: Taus = (0.0,) * len(record.visit)
    trial.faults(full)
    order = _by_harm(trial, record, full)
    starts = {full, *(_left_out(trial, full, order, most) for most in {allowed // 2, allowed})}
    raised = [_raised(trial, start, allowed) for start in sorted(starts, key=record.cost)]
    _refined(trial, record, min(raised, key=record.cost), allowed)
    within = [taus for taus, faults in trial.found.items() if faults <= allowed]
    cheapest = min(within, key=lambda taus: (record.cost(taus), trial.found[taus]))
    return _way_to(cheapest, order, record)


def _way_to(goal: Taus, order: Sequence[int], record: GateRecord) -> list[Taus]:
    """From full traversal to `goal`, layer by layer: first those that are left out."""
    taus: Taus = (0.0,) * len(goal)
    way: list[Taus] = [taus]
    for layer in sorted(order, key=lambda one: goal[one] is not None):
        halfway = [HALFWAY] if goal[layer] is None else []
        for tau in (*halfway, goal[layer]):
            taus = _put(taus, layer, tau)
            if record.cost(taus) < record.cost(way[-1]):
                way.append(taus)
    return way


def _by_harm(trial: Trial, record: GateRecord, full: Taus) -> list[int]:
    """The layers, that one first whose second visits change fewest answers for what they cost.

    Of those that change as many, the one with the smallest gates comes first.
    """
    again, gates = record.again(full), record.least[:, 0].mean(-1).tolist()
    harm = [trial.faults(_put(full, layer, None)) for layer in range(len(full))]
    return sorted(
        range(len(full)), key=lambda layer: (harm[layer] / again[layer], gates[layer], layer)
    )


def _left_out(trial: Trial, full: Taus, order: Sequence[int], allowed: int) -> Taus:
    """The first layers of `order`, as many as can be, without a second visit."""

    def without(count: int) -> Taus:
        return tuple(None if layer in order[:count] else tau for layer, tau in enumerate(full))

    return without(_last(len(order), lambda count: trial.faults(without(count)) <= allowed))


def _raised(trial: Trial, start: Taus, allowed: int) -> Taus:
    """`start` with the largest common threshold on the layers that are left."""

    def common(place: int) -> Taus:
        return tuple(None if tau is None else GRID[place] for tau in start)

    return common(_last(len(GRID) - 1, lambda place: trial.faults(common(place)) <= allowed))


def _refined(trial: Trial, record: GateRecord, start: Taus, allowed: int) -> None:
    """Tries, dearest layer first, to leave it out, or else to raise its threshold."""
    taus, again = start, record.again(start)
    for layer in sorted(range(len(start)), key=lambda one: -again[one]):
        tau = start[layer]
        if tau is None:
            continue
        share = record.shares(taus)[layer]
        higher = [
            _put(taus, layer, one)
            for one in GRID
            if one > tau and record.shares(_put(taus, layer, one))[layer] <= WORTH * share
        ]
        for tried in (_put(taus, layer, None), *higher[:1]):
            if trial.faults(tried) <= allowed:
                taus = tried
                break


def _put(taus: Taus, layer: int, tau: float | None) -> Taus:
    return (*taus[:layer], tau, *taus[layer + 1 :])


def _last(most: int, holds: Callable[[int], bool]) -> int:
    """The last place, 0 to `most`, at which `holds`, if it holds at 0 and never again once not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


TOGETHER = (1, 32)
"""Questions that are read at once."""

ROUNDS = 9

NEW_TOKENS = 2
"""Tokens of an answer: the fewest that are timed."""


@dataclass(frozen=True)
class Prefill:
    """From the call to the first new token; ratios are medians over rounds."""

    questions: int
    """Read at once."""
    tokens: int
    """Of the longest of these questions."""
    milliseconds: dict[str, float]
    """Policy -> median."""
    ratio: dict[str, float]
    """Policy -> time, of the first policy's."""
    spread: dict[str, float]
    """Policy -> half the interquartile range of that ratio."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def prefills(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policies: Mapping[str, AbstractPolicy | str],
    *,
    rounds: int = ROUNDS,
) -> tuple[Prefill, ...]:
    """Times the first questions, alone and together, under each policy; the first is the measure.

    Args:
        model: the model.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions; as many are read together as there are, 32 at most.
        policies: name -> policy.
        rounds: how often each is timed, in turn.
    """
    found = []
    for count in sorted({min(count, len(items)) for count in TOGETHER}):
        some = [fitted(model, processor, item, NEW_TOKENS) for item in items[:count]]
        inputs = prompts(processor, some).to(model.device)
        runs = {name: _run(model, inputs, policy) for name, policy in policies.items()}
        with torch.inference_mode():
            times = interleaved(runs, rounds=rounds, warmups=2)
        first = next(iter(times.values()))
        ratios = {name: ratio_and_spread(first, each) for name, each in times.items()}
        found.append(
            Prefill(
                count,
                inputs["input_ids"].shape[1],
                {name: statistics.median(each) for name, each in times.items()},
                {name: ratio for name, (ratio, _) in ratios.items()},
                {name: spread for name, (_, spread) in ratios.items()},
            )
        )
    return tuple(found)


def _run(model: Any, inputs: Any, policy: AbstractPolicy | str) -> Any:
    def run() -> float:
        with depth(model, policy):
            return time_generate(model, inputs, NEW_TOKENS).prefill

    return run
