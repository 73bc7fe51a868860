"""Removal: lazily measured rounds, and exchanges that only ever gain."""

import random
from itertools import combinations

import pytest

from trol.evaluation.removal import EXCHANGES, Layers, Removal, measurements


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


@pytest.mark.parametrize("seed", range(20))
def test_an_exchange_never_costs_more_and_stops_where_none_gains(seed: int) -> None:
    costs = Costs(10, seed)
    removal = Removal(range(10), costs)
    gone = list(removal.take(4))
    assert set(gone) == set(range(10)) - set(removal.left) == set(removal.gone)
    before = costs(removal.left, ())
    removal.exchange()
    assert len(removal.left) == 6
    assert set(removal.gone) | set(removal.left) == set(range(10))
    assert costs(removal.left, ()) <= before
    removal.exchange(50)
    settled = removal.left
    removal.exchange(50)
    assert removal.left == settled


def test_exchanges_find_what_one_by_one_misses() -> None:
    gains = []
    for seed in range(20):
        costs = Costs(10, seed)
        removal = Removal(range(10), costs)
        for _ in removal.take(4):
            pass
        before = costs(removal.left, ())
        removal.exchange()
        gains.append(before - costs(removal.left, ()))
    assert max(gains) > 0
    assert min(gains) >= 0


@pytest.mark.parametrize(("layers", "count"), [(4, 1), (12, 3), (12, 11), (30, 8)])
def test_as_many_costs_as_were_announced_at_most(layers: int, count: int) -> None:
    costs = Costs(layers, 0)
    removal = Removal(range(layers), costs)
    for _ in removal.take(count):
        pass
    assert costs.asked == measurements(layers, count)
    removal.exchange()
    assert costs.asked <= measurements(layers, count, exchanges=EXCHANGES)


def test_each_round_has_one_base() -> None:
    costs = Costs(12, 3)
    for _ in Removal(range(12), costs).take(5):
        pass
    assert len(costs.bases) == 5
