"""Layers taken away one by one, each time the one whose absence costs least, then exchanged.

What a cost is, the caller says: a loss, or how often a draft is wrong.
"""

import math
from collections.abc import Callable, Iterator, Sequence

PROMISING = 8
"""Candidates for removal that are measured again after the first round: those that cost least
beside the best of the round in which they were measured last."""

EXCHANGES = 2
"""Exchanges of a layer that is gone for one that stays, at most."""

Layers = tuple[int, ...]

Cost = Callable[[Layers, Layers], float]
"""(layers that stay, those of the round's base) -> the cost; lower is better, and never NaN."""


class Removal:
    """A set of layers that loses one after another.

    Args:
        stays: the layers that there are.
        cost: what it costs if some of them alone stay.
    """

    def __init__(self, stays: Sequence[int], cost: Cost) -> None:
        self.left = tuple(stays)
        self.cost = cost
        self.gone: list[int] = []
        self._beside: dict[int, float] = {}
        """The cost of each layer's absence above the best of the last round that measured it."""

    def take(self, count: int) -> Iterator[int]:
        """The next `count` layers that go, each as soon as it is known; fewer than there are.

        Every candidate is measured in the first round, the `PROMISING` of the last round in all
        others. Of equal costs the earliest layer goes.
        """
        for _ in range(count):
            gone, _ = self._cheapest(self._promising() if self._beside else self.left)
            self._remove(gone)
            yield gone

    def exchange(self, most: int = EXCHANGES) -> None:
        """Gives the layer back that is missed most and takes another, as long as that gains."""
        for _ in range(min(most, len(self.gone)) if len(self.left) > 1 else 0):
            before = self.cost(self.left, self.left)
            costs = {one: self.cost(self._with(one), self.left) for one in sorted(self.gone)}
            back = min(costs, key=lambda one: (costs[one], one))
            self.gone.remove(back)
            self.left = self._with(back)
            other, cost = self._cheapest([one for one in self._promising() if one != back])
            self._remove(other if cost < before else back)
            if cost >= before:
                return

    def _promising(self) -> list[int]:
        order = sorted(self.left, key=lambda one: (self._beside.get(one, math.inf), one))
        return sorted(order[:PROMISING])

    def _cheapest(self, tried: Sequence[int]) -> tuple[int, float]:
        """The layer of these whose absence costs least, and that cost."""
        costs = {one: self.cost(self._without(one), self.left) for one in tried}
        gone = min(costs, key=lambda one: (costs[one], one))
        best = costs[gone]
        self._beside |= {k: c if math.isinf(c) else c - best for k, c in costs.items()}
        return gone, best

    def _remove(self, layer: int) -> None:
        self.left = self._without(layer)
        self.gone.append(layer)

    def _without(self, layer: int) -> Layers:
        return tuple(one for one in self.left if one != layer)

    def _with(self, layer: int) -> Layers:
        return tuple(sorted((*self.left, layer)))


def measurements(layers: int, count: int, *, exchanges: int = 0) -> int:
    """How many costs are asked for at most where `count` of so many layers go."""
    later = (min(PROMISING, layers - gone) for gone in range(1, count))
    taking = layers + sum(later) if count else 0
    return taking + min(exchanges, count) * (count + PROMISING)
