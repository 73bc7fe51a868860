"""Layers taken away one by one, each time the one that is missed least: greedy, and lazily so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

PROMISING = 8
"""Candidates that are measured again after the first round: those that cost least beside the best
of the round in which they were measured last."""


def removed(
    stays: Sequence[int], count: int, cost: Callable[[tuple[int, ...]], float]
) -> Iterator[int]:
    """The first `count` layers that go, in their order, each as soon as it is known.

    Every candidate is measured in the first round, the `PROMISING` of the last round in all others.
    Of equal costs the earliest layer goes.

    Args:
        stays: the layers that there are.
        count: how many go, fewer than there are.
        cost: what it costs when these layers alone stay; lower is better, and never NaN.
    """
    left = list(stays)
    beside: dict[int, float] = {}  # what each cost above the best of its last round
    for _ in range(count):
        tried = sorted(left, key=lambda layer: (beside.get(layer, 0.0), layer))
        costs = {
            layer: cost(tuple(one for one in left if one != layer))
            for layer in (sorted(tried[:PROMISING]) if beside else left)
        }
        gone = min(costs, key=lambda layer: (costs[layer], layer))
        best = costs[gone]
        beside |= {k: c if math.isinf(c) else c - best for k, c in costs.items()}
        left.remove(gone)
        yield gone


def measurements(layers: int, count: int) -> int:
    """How often `removed` asks for a cost where `count` of so many layers go."""
    later = (min(PROMISING, layers - gone) for gone in range(1, count))
    return layers + sum(later) if count else 0
