"""Layers taken away one by one, each time the one whose absence costs least.

What a cost is, the caller says: a loss, or how often a draft is wrong.
"""

import math
from collections.abc import Callable, Iterator, Sequence

PROMISING = 8
"""Candidates for removal that are measured again after the first round: those that cost least
beside the best of the round in which they were measured last."""

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
        self._beside: dict[int, float] = {}
        """The cost of each layer's absence above the best of the last round that measured it."""

    def take(self, count: int) -> Iterator[int]:
        """The next `count` layers that go, each as soon as it is known; fewer than there are.

        Every candidate is measured in the first round, the `PROMISING` of the last round in all
        others. Of equal costs the earliest layer goes.
        """
        for _ in range(count):
            gone = self._cheapest(self._promising() if self._beside else self.left)
            self.left = self._without(gone)
            yield gone

    def _promising(self) -> list[int]:
        order = sorted(self.left, key=lambda one: (self._beside.get(one, math.inf), one))
        return sorted(order[:PROMISING])

    def _cheapest(self, tried: Sequence[int]) -> int:
        """The layer of these whose absence costs least; the earliest of equal ones."""
        costs = {one: self.cost(self._without(one), self.left) for one in tried}
        gone = min(costs, key=lambda one: (costs[one], one))
        best = costs[gone]
        self._beside |= {k: c if math.isinf(c) else c - best for k, c in costs.items()}
        return gone

    def _without(self, layer: int) -> Layers:
        return tuple(one for one in self.left if one != layer)


def measurements(layers: int, count: int) -> int:
    """How many costs are asked for where `count` of so many layers go."""
    later = (min(PROMISING, layers - gone) for gone in range(1, count))
    return layers + sum(later) if count else 0
