"""What an oracle is held against: the same budgets, spent without its knowledge.

The oracle reads the reference before it chooses among the outputs of a menu. So it gains in two
ways: a sequence may need few layers, and the best of several outputs is better than one of them.
These controls take the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol.evaluation.oracle.knapsack import Knapsack, solve

Scores = NDArray[np.float64]
"""What each sequence gets at each level. Shape: [N, J]."""

SHUFFLES = 200
"""Random allocations whose spread is reported."""


def random_allocation(scores: Scores, choices: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """The oracle's own levels, dealt out to the sequences at random.

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
    """What can be known beforehand: levels by type of question, chosen on the other half.

    The set is split in two at random, each type evenly. On each half every type's mean at every
    level is measured;
    the other half's sequences get levels as if they would score these means, by the same exact
    knapsack, mixes of levels within a type included. What they score is their own, in the mean
    over who of a type gets which of its levels.

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
    """For each sequence asked about, the mean of its type. Shape: [N, J]."""
    overall = scores.mean(axis=0)
    means = {kind: scores[kinds == kind].mean(axis=0) for kind in np.unique(kinds)}
    return np.stack([means.get(kind, overall) for kind in asked])
