"""How far an oracle's share of layers would lie apart on other questions like these: bootstrap."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    """Where each sequence starts, and all steps up from there, those that gain most first.

    Returns:
        the best of each sequence's cheapest levels [N]; of each step its sequence, cost and gain.
    """
    cheapest = np.flatnonzero(costs == costs.min())
    start = cheapest[scores[:, cheapest].argmax(axis=1)]
    found: list[tuple[float, int, float, float]] = []
    for row, values in enumerate(scores):
        at = start[row]
        while True:
            dearer = np.flatnonzero((costs > costs[at]) & (values > values[at]))
            if not dearer.size:
                break
            slopes = (values[dearer] - values[at]) / (costs[dearer] - costs[at])
            to = dearer[len(slopes) - 1 - slopes[::-1].argmax()]  # of equal slopes the longest
            spent, gained = float(costs[to] - costs[at]), float(values[to] - values[at])
            found.append((-gained / spent, row, spent, gained))
            at = to
    found.sort(key=lambda step: step[0])
    steps = np.array(found).reshape(-1, 4)
    return start, steps[:, 1].astype(np.int64), steps[:, 2], steps[:, 3]
