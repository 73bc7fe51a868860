"""The multiple-choice knapsack, exact, for every budget at once.

One of J levels for each of N sequences, so that the summed value is the largest and the summed
cost stays within the budget (arXiv 2410.20022, experiment 3):

    best(b) = max { Σ_i v[i, j_i] : Σ_i c[i, j_i] <= b }

With integer costs a table over budgets gives all of them in one pass over the sequences:

    best_i(b) = max_j best_{i-1}(b - c[i, j]) + v[i, j]

The oracle's controls spend the same budgets without its knowledge. The oracle reads the reference
before it chooses among the outputs of a menu, so it gains in two ways: a sequence may need few
layers, and the best of several outputs is better than one of them. The controls separate the two.
A bootstrap gives the interval of the oracle's share of layers.
"""

import math
from collections.abc import Sequence
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
        levels = np.empty(len(self.costs), dtype=np.int64)
        floor = self.costs.min(axis=1)
        for item in reversed(range(len(self.costs))):
            table = self.chosen[item]
            # Beyond the table's end everything is affordable, and the rest stays unspent.
            left = min(left, len(table) - 1)
            level = int(table[left])
            left -= int(self.costs[item, level] - floor[item]) // self.unit
            levels[item] = level
        return levels

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
    after = before + values[kept[0]]
    table = np.full(len(after), kept[0], dtype=np.uint8)
    for level in kept[1:]:
        cost = int(costs[level])
        candidate = before[: len(before) - cost] + values[level]
        better = candidate > after[cost:]
        after[cost:][better] = candidate[better]
        table[cost:][better] = level
    return after, table


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


Scores = NDArray[np.float64]
"""The score of each sequence at each level. Shape: [N, J]."""

SHUFFLES = 200
"""Random allocations whose spread is reported."""


def random_allocation(scores: Scores, choices: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """The mean score of the oracle's own levels, dealt out to the sequences at random.

    E = Σ_j p_j · mean_i v[i, j], with p_j the share of sequences that the oracle puts on level j.

    Returns:
        The mean over all allocations, exactly, and the standard deviation over `SHUFFLES` of them.
    """
    shares = np.bincount(choices, minlength=scores.shape[1]) / len(choices)
    source = np.random.default_rng(seed)
    rows = np.arange(len(scores))
    dealt = [scores[rows, source.permutation(choices)].mean() for _ in range(SHUFFLES)]
    return float(shares @ scores.mean(axis=0)), float(np.std(dealt, ddof=1))


def best_of_n(greedy: NDArray[np.float64], drawn: Scores) -> list[float]:
    """Mean of the best of n outputs of the full model, for n = 1, 2, ...; the first is greedy.

    Args:
        greedy: scores of the greedy answers. Shape: [N].
        drawn: scores of the answers drawn at full depth. Shape: [N, S].
    """
    outputs = np.column_stack([greedy, drawn])
    return np.maximum.accumulate(outputs, axis=1).mean(axis=0).tolist()


def single_level(scores: Scores, costs: Sequence[int], layers: float) -> float:
    """The best mean of one level for all sequences that costs at most `layers`."""
    affordable = np.asarray(costs) <= layers + 1e-9
    return float(scores.mean(axis=0)[affordable].max())


class HeldOut:
    """A control without the reference: levels by type of question, chosen on the other half.

    The set is split in two at random, each type evenly. On each half every type's mean at every
    level is measured. The other half's sequences get levels as if they scored these means, by the
    same exact knapsack; a type's levels may be a mix. Their scores are their own, averaged over
    all ways to deal a type's levels to its sequences.

    Args:
        scores: of the sequences. Shape: [N, J].
        costs: of the levels.
        types: of the questions; a type that one half lacks takes the mean of all types there.
        seed: of the split.
    """

    def __init__(
        self, scores: Scores, costs: Sequence[int], types: Sequence[str], seed: int
    ) -> None:
        kinds = np.asarray(types)
        order = np.random.default_rng(seed).permutation(len(scores))
        order = order[np.argsort(kinds[order], kind="stable")]  # each type in both halves alike
        halves = (order[::2], order[1::2])
        self._parts: list[tuple[Knapsack, Scores, Any]] = []
        for known, asked in (halves, halves[::-1]):
            expected = _means_by_type(scores[known], kinds[known], kinds[asked])
            self._parts.append((solve(costs, expected), scores[asked], kinds[asked]))
        self._count = len(scores)

    def score(self, layers: float) -> float:
        """The mean score with a mean budget of `layers` layers a sequence."""
        total = 0.0
        for knapsack, scores, kinds in self._parts:
            choices = knapsack.choices(math.floor(layers * len(scores) + 1e-6))
            for kind in np.unique(kinds):
                mine = kinds == kind
                dealt = np.bincount(choices[mine], minlength=scores.shape[1])
                total += float(dealt @ scores[mine].mean(axis=0))
        return total / self._count


def _means_by_type(scores: Scores, kinds: Any, asked: Any) -> Scores:
    """For each sequence of the kinds in `asked`, the mean of its type. Shape: [N, J]."""
    overall = scores.mean(axis=0)
    means = {kind: scores[kinds == kind].mean(axis=0) for kind in np.unique(kinds)}
    return np.stack([means.get(kind, overall) for kind in asked])


RESAMPLES = 200


def equal_shares(
    costs: ArrayLike, scores: NDArray[np.float64], full: int, layers: int, seed: int = 0
) -> list[float]:
    """The 95 % interval of `equal_budget`'s share over resamples of the sequences.

    Each resample draws N sequences with replacement; its budget is that of the knapsack's linear
    relaxation, which lies below the exact one by one step of one sequence at most.

    Args:
        costs: of each level. Shape: [M]. Unit: layers.
        scores: higher is better. Shape: [N, M].
        full: the level of the full model.
        layers: of the stack.
        seed: of the resamples.
    """
    steps = np.asarray(costs, dtype=np.float64)
    sure, rows, spent, gained = _hulls(steps, scores)
    count = len(scores)
    source = np.random.default_rng(seed)
    shares: list[float] = []
    for _ in range(RESAMPLES):
        weights = np.bincount(source.integers(count, size=count), minlength=count)
        wanted = float(weights @ (scores[:, full] - scores[np.arange(count), sure]))
        cost = float(weights @ steps[sure])
        gains = np.cumsum(weights[rows] * gained)
        whole = int(np.searchsorted(gains, wanted - 1e-9)) if wanted > 1e-9 else 0
        paid = weights[rows] * spent
        cost += float(paid[:whole].sum())
        if wanted > 1e-9 and whole < len(gains):
            before = gains[whole - 1] if whole else 0.0
            step = gains[whole] - before
            cost += float(paid[whole] * (wanted - before) / step) if step > 0 else 0.0
        shares.append(cost / count / layers)
    return [round(float(one), 9) for one in np.percentile(shares, [2.5, 97.5])]


def _hulls(costs: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[NDArray, ...]:
    """Each sequence's cheapest level, and all steps up from there, those that gain most first.

    Returns:
        the best of each sequence's cheapest levels [N]; of each step its sequence, cost and gain.
    """
    cheapest = np.flatnonzero(costs == costs.min())
    start = cheapest[scores[:, cheapest].argmax(axis=1)]
    rising: list[tuple[float, int, float, float]] = []
    for row, values in enumerate(scores):
        at = start[row]
        while True:
            dearer = np.flatnonzero((costs > costs[at]) & (values > values[at]))
            if not dearer.size:
                break
            slopes = (values[dearer] - values[at]) / (costs[dearer] - costs[at])
            to = dearer[len(slopes) - 1 - slopes[::-1].argmax()]  # of equal slopes the longest
            spent, gained = float(costs[to] - costs[at]), float(values[to] - values[at])
            rising.append((-gained / spent, row, spent, gained))
            at = to
    rising.sort(key=lambda step: step[0])
    steps = np.array(rising).reshape(-1, 4)
    return start, steps[:, 1].astype(np.int64), steps[:, 2], steps[:, 3]
