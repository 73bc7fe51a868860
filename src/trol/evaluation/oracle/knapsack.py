"""The multiple-choice knapsack, exact, for every budget at once.

One of J levels for each of N sequences, so that the summed value is the largest and the summed
cost stays within the budget (arXiv 2410.20022, experiment 3):

    best(b) = max { Σ_i v[i, j_i] : Σ_i c[i, j_i] <= b }

With integer costs a table over budgets gives all of them in one pass over the sequences:

    best_i(b) = max_j best_{i-1}(b - c[i, j]) + v[i, j]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trol.errors import UsageError

SLACK = 1e-9
"""How far a mean value may lie below another one and still count as equal: rounding in sums."""


@dataclass(frozen=True)
class Knapsack:
    """The best summed value for every budget, and the choices that reach it."""

    costs: NDArray[np.int64]
    """Shape: [N, J]. Unit: layers."""
    least: int
    """The smallest budget that has a solution. Unit: layers, summed over sequences."""
    unit: int
    """Budgets between least + k·unit and the next buy nothing more."""
    values: NDArray[np.float64]
    """Best summed value with a budget of least + k·unit. Shape: [K]."""
    chosen: list[NDArray[np.uint8]]
    """For each sequence, the level that the best solution over it and all before it takes."""

    @property
    def budgets(self) -> NDArray[np.int64]:
        """The budgets that `values` belongs to. Shape: [K]."""
        return self.least + self.unit * np.arange(len(self.values))

    def value(self, budget: float) -> float:
        """The best summed value with a budget; raises `UsageError` where none fits."""
        return float(self.values[self._index(budget)])

    def cheapest(self, value: float) -> int:
        """The smallest budget whose best summed value is at least `value`.

        Raises:
            UsageError: no budget reaches it.
        """
        slack = SLACK * len(self.costs)
        reached = np.flatnonzero(self.values >= value - slack)
        if not len(reached):
            raise UsageError(
                f"no choice has a summed value of {value}; ask for {self.values[-1]} at most."
            )
        return int(self.budgets[reached[0]])

    def choices(self, budget: float) -> NDArray[np.int64]:
        """Which level each sequence gets in a best solution with this budget. Shape: [N]."""
        left = self._index(budget)
        found = np.empty(len(self.costs), dtype=np.int64)
        floor = self.costs.min(axis=1)
        for item in reversed(range(len(self.costs))):
            table = self.chosen[item]
            # Beyond the table's end everything is affordable, and the rest stays unspent.
            left = min(left, len(table) - 1)
            level = int(table[left])
            left -= int(self.costs[item, level] - floor[item]) // self.unit
            found[item] = level
        return found

    def _index(self, budget: float) -> int:
        if budget < self.least:
            raise UsageError(
                f"a budget of {budget} is below the cheapest choice; give {self.least} or more."
            )
        return min(int((budget - self.least) // self.unit), len(self.values) - 1)


def solve(costs: ArrayLike, values: ArrayLike) -> Knapsack:
    """The best choice of one level per sequence, for every budget.

    Args:
        costs: whole numbers, one row for all sequences or one for each. Shape: [J] or [N, J].
        values: what each sequence gets at each level. Shape: [N, J].

    Raises:
        UsageError: costs are no whole numbers or negative, values are not finite, or shapes differ.
    """
    worth = np.asarray(values, dtype=np.float64)
    price = _checked(np.asarray(costs), worth)
    floor = price.min(axis=1)
    extra = price - floor[:, None]
    unit = max(1, reduce(np.gcd, extra.ravel().tolist(), 0))
    extra //= unit
    best = np.zeros(1)
    chosen: list[NDArray[np.uint8]] = []
    for item in range(len(worth)):
        kept = undominated(extra[item], worth[item])
        best, table = _with_one_more(best, extra[item], worth[item], kept)
        chosen.append(table)
    return Knapsack(price, int(floor.sum()), unit, best, chosen)


def undominated(costs: NDArray[Any], values: NDArray[Any]) -> list[int]:
    """Levels that are worth more than every cheaper one, cheapest first."""
    order = np.lexsort((-values, costs))
    kept: list[int] = []
    for level in order:
        if not kept or values[level] > values[kept[-1]]:
            kept.append(int(level))
    return kept


def _with_one_more(
    best: NDArray[np.float64], costs: NDArray[Any], values: NDArray[Any], kept: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """best_i from best_{i-1}, and the level that each budget takes; the first kept costs 0."""
    reach = int(costs[kept[-1]])
    before = np.concatenate([best, np.full(reach, best[-1])])
    found = before + values[kept[0]]
    table = np.full(len(found), kept[0], dtype=np.uint8)
    for level in kept[1:]:
        cost = int(costs[level])
        candidate = before[: len(before) - cost] + values[level]
        better = candidate > found[cost:]
        found[cost:][better] = candidate[better]
        table[cost:][better] = level
    return found, table


def _checked(costs: NDArray[Any], values: NDArray[np.float64]) -> NDArray[np.int64]:
    if values.ndim != 2 or 0 in values.shape or values.shape[1] > 256:
        raise UsageError(
            f"values have shape {values.shape}; give [sequences, levels], at least one of each and "
            "at most 256 levels."
        )
    if not np.isfinite(values).all():
        raise UsageError("a value is not finite; give every sequence a number at every level.")
    if costs.dtype.kind not in "iu" or (costs < 0).any():
        raise UsageError("costs must be whole numbers of at least 0; give layers.")
    try:
        return np.broadcast_to(costs, values.shape).astype(np.int64)
    except ValueError as error:
        raise UsageError(
            f"costs have shape {costs.shape}, values {values.shape}; give one cost per level."
        ) from error
