"""The search for thresholds of a mixer: which second visits the answers can do without.

Every setting is judged by answering questions under it. Layers are tried alone, then left out
together, those that do least harm first; then one threshold is raised for the layers that stay;
then each layer is tried on its own again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trol.depth import depth
from trol.evaluation.calibration.gate_record import GateRecord, Taus, at
from trol.evaluation.tasks import Item, answers
from trol.policies.mixer import TrolMixer

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
