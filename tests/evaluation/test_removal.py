"""Removal: lazily measured rounds, each from one base."""

import random
from itertools import combinations

import pytest

from trol.evaluation.removal import PROMISING, Layers, Removal, measurements


class Costs:
    """Costs of sets of layers that are nearly, but not quite, sums over the layers."""

    def __init__(self, layers: int, seed: int) -> None:
        self.source = random.Random(seed)
        self.alone = [self.source.random() for _ in range(layers)]
        self.pairs = {pair: self.source.random() for pair in combinations(range(layers), 2)}
        self.layers, self.asked = layers, 0
        self.bases: set[Layers] = set()

    def __call__(self, stays: Layers, base: Layers) -> float:
        self.asked += 1
        self.bases.add(base)
        gone = [one for one in range(self.layers) if one not in stays]
        return sum(self.alone[one] for one in gone) + sum(
            self.pairs[pair] for pair in combinations(gone, 2)
        )


def test_a_few_layers_are_measured_in_later_rounds_and_the_right_ones_go() -> None:
    """Where costs are sums, the promising candidates are enough to find the cheapest set."""
    for seed in range(20):
        costs = Costs(12, seed)
        costs.pairs = dict.fromkeys(costs.pairs, 0.0)
        removal = Removal(range(12), costs)
        gone = list(removal.take(5))
        assert gone == sorted(range(12), key=costs.alone.__getitem__)[:5]
        assert removal.left == tuple(sorted(set(range(12)) - set(gone)))


@pytest.mark.parametrize(("layers", "count"), [(4, 1), (12, 3), (12, 11), (30, 8)])
def test_as_many_costs_as_were_announced(layers: int, count: int) -> None:
    costs = Costs(layers, 0)
    removal = Removal(range(layers), costs)
    for _ in removal.take(count):
        pass
    assert costs.asked == measurements(layers, count)


def test_each_round_has_one_base() -> None:
    costs = Costs(12, 3)
    for _ in Removal(range(12), costs).take(5):
        pass
    assert len(costs.bases) == 5
    assert PROMISING < 12
