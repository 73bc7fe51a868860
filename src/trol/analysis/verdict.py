"""What paired differences over seeds allow to be said: never more than the numbers show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Paired differences a - b of a share (0 to 1), one pair per seed."""

    differences: tuple[float, ...]
    mean: float
    spread: float | None
    """Sample standard deviation over seeds; None for a single seed."""
    low: float | None
    """Lower end of the 95 % interval of the mean (Student's t); None for a single seed."""
    high: float | None
    """Its upper end."""

    @property
    def shown(self) -> bool:
        """Whether the interval leaves zero out, so that the sign of the mean is shown."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Pair `a` with `b`, seed by seed."""
    differences = tuple(x - y for x, y in zip(a, b, strict=True))
    if not differences:
        raise ValueError("compare: no seeds were given; give at least one pair.")
    mean = statistics.fmean(differences)
    n = len(differences)
    if n == 1:
        return Comparison(differences, mean, None, None, None)
    spread = statistics.stdev(differences)
    half = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * spread / math.sqrt(n)
    return Comparison(differences, mean, spread, mean - half, mean + half)


def verdict(a: Sequence[float], b: Sequence[float], *, this: str, that: str) -> str:
    """One or two sentences on whether `this` (a) scored differently from `that` (b)."""
    found = compare(a, b)
    n = len(found.differences)
    points = f"{signed(found.mean)} points"
    if found.low is None or found.high is None:
        return (
            f"One seed, so no spread and no conclusion: {this} minus {that} was {points} "
            "on this seed; another seed may turn the sign."
        )
    numbers = (
        f"mean difference {points}, 95 % interval {signed(found.low)} to "
        f"{signed(found.high)} over {n} seeds; {wins(found)}"
    )
    if not found.shown:
        return f"No difference is shown between {this} and {that}: {numbers}."
    direction = "higher" if found.mean > 0 else "lower"
    caution = " Few seeds: take it as a lead." if n < 5 else ""
    return f"{this[0].upper()}{this[1:]} scored {direction} than {that}: {numbers}.{caution}"


def signed(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def wins(found: Comparison) -> str:
    """In how many seeds the first of the pair was ahead."""
    ahead = sum(difference > 0 for difference in found.differences)
    return f"ahead in {ahead} of {len(found.differences)}"


def mean_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for one value)."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), spread
