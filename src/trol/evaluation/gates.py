"""Gates of a mixer: their values under full traversal, and which second visits can be left out.

    again_l = (N - 1) T (share_l visit_l + (1 - share_l) keys_l)      0 if no token goes again
    cost = (sum_l visit_l T + again_l) / sum_l visit_l T

share_l is the part of the tokens in scope whose gate on layer l is above its threshold; of the
others, only keys and values are computed. So 1 is the plain model's cost, and full traversal with N
passes costs about N.

The search judges every setting of thresholds by answering questions under it. Layers are tried
alone, then left out in groups, those that do least harm first; then one threshold is raised for the
layers that stay; then each layer is tried on its own again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attached, depth, trace
from trol.depth.attachment import cost_of
from trol.depth.trace import StackCost, Trace
from trol.errors import HostError
from trol.evaluation.answers import answer, answers, scores
from trol.evaluation.items import Item, board_items, prompts
from trol.evaluation.tasks import TASKS
from trol.evaluation.timing import Prefill
from trol.policies.mixer import TrolMixer

Thresholds = tuple[float | None, ...]
"""A gate threshold for each layer; None for a layer whose second visits are all left out."""

KEYS_SHARE = 1 / 6
"""What keys and values alone are taken to cost, as a share of a visit, where FLOPs are not
known: four square matrices read the state in attention, two or three of four times their size
after it, and keys and values are two of the first."""

GRID = (0.0, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, *(n / 10 for n in range(2, 10)), 0.95, 0.99)
"""Thresholds that are tried: even where gates of small models lie, and fine near 0, where those of
the published ones do."""

WORTH = 0.9
"""A threshold is tried on one layer if it makes at most this share of the visits left there."""

HALFWAY = 0.5
"""A threshold that is judged before a layer is left out: gates below it are mostly shut."""

SPARSE_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds of a sparse curve; tokens whose gate is no larger leave after one visit."""

TRACED = 128
"""Questions whose gates a spread or a sparse curve reads."""


@dataclass(frozen=True)
class GateRecord:
    """The gates of M tokens in scope on L layers."""

    least: Tensor
    """The smallest gate up to each second or later visit: a token makes the visit if it is above
    the threshold. Shape: [L, N - 1, M]."""
    answers: tuple[str, ...]
    """The answers under full traversal."""
    visit: tuple[float, ...]
    """Cost of a visit of layer l, for one token."""
    keys: tuple[float, ...]
    """Cost of the keys and values alone on layer l, for one token."""
    flops: bool
    """Whether these are FLOPs; otherwise they are shares of a visit."""

    def shares(self, thresholds: Thresholds) -> list[float]:
        """The share of each layer's second and later visits that is made: [L]."""
        return [
            0.0 if one is None else 1.0 if one == 0 else (gates > one).float().mean().item()
            for one, gates in zip(thresholds, self.least, strict=True)
        ]

    def again(self, thresholds: Thresholds) -> list[float]:
        """The cost of each layer's second and later visits, per token: [L]."""
        later = self.least.shape[1]
        each = zip(thresholds, self.shares(thresholds), self.visit, self.keys, strict=True)
        return [
            0.0 if one is None else later * (share * visit + (1 - share) * keys)
            for one, share, visit, keys in each
        ]

    def cost(self, thresholds: Thresholds) -> float:
        """The cost under these thresholds, as a multiple of the plain model's."""
        return 1 + sum(self.again(thresholds)) / sum(self.visit)


def full_traversal(layers: int) -> Thresholds:
    """The thresholds under which every second visit is made."""
    return (0.0,) * layers


def at(mixer: TrolMixer, thresholds: Thresholds) -> TrolMixer:
    """The same mixer at other thresholds."""
    tau = 0.0 if all(one == 0 for one in thresholds) else list(thresholds)
    return TrolMixer(**{**mixer.settings(), "tau": tau})


def record_gates(
    model: Any, processor: Any, items: Sequence[Item], mixer: TrolMixer, *, new_tokens: int
) -> GateRecord:
    """Answers the questions under full traversal, and keeps the gates of the tokens in scope.

    Raises:
        HostError: no token is in scope.
    """
    texts: list[str] = []
    parts: list[Tensor] = []
    lengths = []
    with depth(model, at(mixer, (0.0,))):
        for batch in answer(model, processor, items, new_tokens=new_tokens, traced=True):
            seen = _traced(batch.trace)
            in_scope = (seen.visits > 1).any(0) & seen.real  # at 0 all of them go again
            parts.append(_least(seen.weights, in_scope, mixer.passes))
            lengths.append(seen.real.sum().item() / len(batch.texts))
            texts += batch.texts
    least = torch.cat(parts, dim=-1)
    if not least.shape[-1]:
        raise HostError(
            f"no token of these questions is in the scope {mixer.scope!r}, so no gate is asked."
        )
    visit, keys, known = _unit_costs(cost_of(model), round(sum(lengths) / len(lengths)))
    return GateRecord(least, tuple(texts), visit, keys, known)


def count_second_visits(
    model: Any, processor: Any, items: Sequence[Item], mixer: TrolMixer, *, new_tokens: int
) -> Tensor:
    """How many second and later visits each layer makes in answering these. Shape: [L]."""
    counts = torch.zeros(attached(model)[1].depth_layers, dtype=torch.long)
    with depth(model, mixer):
        for batch in answer(model, processor, items, new_tokens=new_tokens, traced=True):
            seen = _traced(batch.trace)
            counts += ((seen.visits - 1).clamp(min=0) * seen.real).sum((1, 2))
    return counts


def _traced(seen: Trace | None) -> Trace:
    assert seen is not None  # it was asked for
    return seen


def _least(weights: Tensor, chosen: Tensor, passes: int) -> Tensor:
    """min_{j <= r} g(x_j), from w_r = (1 - g(x_r)) prod_{j < r} g(x_j). Shape: [L, N - 1, M]."""
    alive = torch.ones_like(weights[:, 0][:, chosen])
    least, parts = alive, []
    for visit in range(1, passes):
        gate = 1 - weights[:, visit][:, chosen] / alive.clamp(min=1e-12)
        least = torch.minimum(least, gate)
        parts.append(least)
        alive = alive * gate
    return torch.stack(parts, dim=1)


def _unit_costs(stack: StackCost, tokens: int) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Cost of a visit and of keys and values for each layer; and whether these are FLOPs."""
    visit, keys = [], []
    for layer, gate in zip(stack.layers, stack.gate_per_token, strict=True):
        if layer is None or layer.keys_per_token is None:
            count = len(stack.layers)
            return (1.0,) * count, (KEYS_SHARE,) * count, False
        visit.append(float(layer.flops(tokens, step=tokens) / tokens))
        keys.append(float(layer.keys_per_token + gate))
    return tuple(visit), tuple(keys), True


@dataclass
class Trial:
    """Thresholds tried on one set of questions, each setting once."""

    model: Any
    processor: Any
    items: Sequence[Item]
    mixer: TrolMixer
    new_tokens: int
    full: Sequence[str]
    """The answers under full traversal."""
    after_pass: Callable[[], None]
    counts: dict[Thresholds, int] = field(default_factory=dict)
    """Thresholds -> answers that differ from those of full traversal."""

    def changed(self, thresholds: Thresholds) -> int:
        """How many answers differ."""
        if thresholds not in self.counts:
            with depth(self.model, at(self.mixer, thresholds)):
                texts = answers(self.model, self.processor, self.items, new_tokens=self.new_tokens)
            self.counts[thresholds] = sum(a != b for a, b in zip(texts, self.full, strict=True))
            self.after_pass()
        return self.counts[thresholds]

    def agreement(self, thresholds: Thresholds) -> "Agreement":
        """How many answers are kept."""
        return Agreement(self.changed(thresholds), len(self.items))


def search(trial: Trial, record: GateRecord, allowed: int) -> list[Thresholds]:
    """Settings from full traversal to the cheapest that changes at most `allowed` answers.

    Each leaves out all that the one before it leaves out: a layer more, from the least harmful on.
    """
    full = full_traversal(len(record.visit))
    trial.changed(full)
    order = _by_harm(trial, record, full)
    starts = {full, *(_left_out(trial, full, order, most) for most in {allowed // 2, allowed})}
    raised = [_raised(trial, start, allowed) for start in sorted(starts, key=record.cost)]
    _refine(trial, record, min(raised, key=record.cost), allowed)
    within = [setting for setting, changed in trial.counts.items() if changed <= allowed]
    goal = min(within, key=lambda setting: (record.cost(setting), trial.counts[setting]))
    way, setting = [full], full
    for layer in sorted(order, key=lambda one: goal[one] is not None):  # those left out first
        halfway = [HALFWAY] if goal[layer] is None else []
        for threshold in (*halfway, goal[layer]):
            setting = _put(setting, layer, threshold)
            if record.cost(setting) < record.cost(way[-1]):
                way.append(setting)
    return way


def _by_harm(trial: Trial, record: GateRecord, full: Thresholds) -> list[int]:
    """The layers, that one first whose second visits change fewest answers for what they cost.

    Of those that change as many, the one with the smallest gates comes first.
    """
    again, gates = record.again(full), record.least[:, 0].mean(-1).tolist()
    harm = [trial.changed(_put(full, layer, None)) for layer in range(len(full))]
    return sorted(
        range(len(full)), key=lambda layer: (harm[layer] / again[layer], gates[layer], layer)
    )


def _left_out(trial: Trial, full: Thresholds, order: Sequence[int], allowed: int) -> Thresholds:
    """The first layers of `order`, as many as can be, without a second visit."""

    def without(count: int) -> Thresholds:
        return tuple(None if layer in order[:count] else one for layer, one in enumerate(full))

    return without(last_holding(len(order), lambda n: trial.changed(without(n)) <= allowed))


def _raised(trial: Trial, start: Thresholds, allowed: int) -> Thresholds:
    """`start` with the largest common threshold on the layers that are left."""

    def common(place: int) -> Thresholds:
        return tuple(None if one is None else GRID[place] for one in start)

    return common(last_holding(len(GRID) - 1, lambda n: trial.changed(common(n)) <= allowed))


def _refine(trial: Trial, record: GateRecord, start: Thresholds, allowed: int) -> None:
    """Tries, dearest layer first, to leave it out, or else to raise its threshold."""
    setting, again = start, record.again(start)
    for layer in sorted(range(len(start)), key=lambda one: -again[one]):
        now = start[layer]
        if now is None:
            continue
        share = record.shares(setting)[layer]
        higher = [
            _put(setting, layer, one)
            for one in GRID
            if one > now and record.shares(_put(setting, layer, one))[layer] <= WORTH * share
        ]
        for tried in (_put(setting, layer, None), *higher[:1]):
            if trial.changed(tried) <= allowed:
                setting = tried
                break


def _put(thresholds: Thresholds, layer: int, threshold: float | None) -> Thresholds:
    return (*thresholds[:layer], threshold, *thresholds[layer + 1 :])


def last_holding(most: int, holds: Callable[[int], bool]) -> int:
    """The last place, 0 to `most`, at which `holds`, if it holds at 0 and never again once not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Agreement:
    """How many of `questions` answers differ from those of full traversal."""

    changed: int
    questions: int

    @property
    def share(self) -> float:
        """The share of answers kept."""
        return 1 - self.changed / self.questions


@dataclass(frozen=True)
class GateCalibration:
    """A mixer with its thresholds, and what was measured of them."""

    policy: TrolMixer
    searched: Agreement
    """The agreement on the questions that the thresholds were searched on."""
    kept: Agreement
    """The agreement on the other questions."""
    p_value: float
    """For the hypothesis that less than the wanted share is kept."""
    at_least: float
    """The lower confidence limit of that share, were this the only setting judged; over all that
    were judged, what holds with the wanted confidence is the wanted quality."""
    shares: tuple[float, ...]
    """The share of full traversal's second visits that is still made, by layer: [L]."""
    cost: tuple[float, float]
    """Predicted cost of a prompt under full and sparse traversal, as multiples of the plain
    model's."""
    flops: bool
    """Whether that is FLOPs; layer visits otherwise."""
    tried: int
    """Settings of thresholds whose answers were looked at."""
    prefill: tuple[Prefill, ...]
    """Measured in this run."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "policy": self.policy.settings(),
            "kept": {
                "share": self.kept.share,
                "at_least": self.at_least,
                "faults": self.kept.changed,
                "questions": self.kept.questions,
            },
            "p_value": self.p_value,
            "searched": {
                "share": self.searched.share,
                "questions": self.searched.questions,
                "tried": self.tried,
            },
            "second_visits": list(self.shares),
            "cost": {
                "unit": "FLOPs" if self.flops else "layer visits",
                "full": self.cost[0],
                "sparse": self.cost[1],
            },
            "prefill": [one.json() for one in self.prefill],
        }


class RandomSecondVisits(AbstractPolicy):
    """The mixer, but only a random share of tokens, layer by layer, makes the second visit."""

    name = "random_second_visits"

    def __init__(self, mixer: TrolMixer, share: float, seed: int) -> None:
        super().__init__(scope=mixer.scope, training_scope=mixer.training_scope)
        self.mixer, self.share, self.seed = mixer, share, seed

    def bounds(self, layer: int) -> Bounds:
        return Bounds(1, self.mixer.bounds(layer).most)

    def again(self, visit: Visit) -> Answer:
        weight = self.mixer.again(visit)
        if visit.number == 0 or not isinstance(weight, Tensor):
            return weight
        source = torch.Generator().manual_seed(self.seed * 1000 + visit.layer)
        chosen = torch.rand(weight.shape, generator=source).to(weight.device) < self.share
        return torch.where(chosen, weight, 0.0)

    def settings(self) -> dict[str, Any]:
        return {"mixer": self.mixer.settings(), "share": self.share, "seed": self.seed}


def gate_spread(model: Any, processor: Any, items: Sequence[Item]) -> dict[str, list[float]]:
    """Mean, 5th and 95th percentile of the gate over question tokens, layer by layer: [L] each."""
    gates = _question_gates(model, processor, items)
    return {
        "mean": gates.mean(1).tolist(),
        "low": gates.quantile(0.05, dim=1).tolist(),
        "high": gates.quantile(0.95, dim=1).tolist(),
    }


def sparse_curve(
    model: Any, processor: Any, *, questions: int = 540, seed: int = 0
) -> list[dict[str, float]]:
    """Accuracy on boards against the share of second visits made.

    Small gates are left out, or as many gates drawn at random.

    Returns:
        `[{"tau", "share", "accuracy", "random"}]`; share of the second visits that tau = 0 makes.
    """
    mixer = attached(model)[1].depth_policy
    items = board_items(questions, seed)

    def accuracy() -> float:
        texts = answers(model, processor, items, new_tokens=TASKS["boards"].new_tokens)
        return sum(scores("exact", texts, items)) / len(items)

    points: list[dict[str, float]] = []
    for tau in SPARSE_THRESHOLDS:
        with depth(model, TrolMixer(**{**mixer.settings(), "tau": tau})):
            gates = _question_gates(model, processor, items[:TRACED])
            share = (gates > 0).float().mean().item()
            point = {"tau": tau, "share": share, "accuracy": accuracy()}
        with depth(model, RandomSecondVisits(mixer, share, seed)):
            points.append({**point, "random": accuracy()})
    return points


def _question_gates(model: Any, processor: Any, items: Sequence[Item]) -> Tensor:
    """The weight of each question token's second visit on each layer. Shape: [L, tokens]."""
    inputs = prompts(processor, items).to(model.device)
    with trace(model) as seen, torch.inference_mode():
        model(**inputs)
    return seen.weights[:, 2][:, seen.real]
