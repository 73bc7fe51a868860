"""What a set of answers can show of all answers like them."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from trol.errors import UsageError

Progress = Callable[[int, int], None]
"""(passes over questions made, passes known of so far)."""


def needed(quality: float, confidence: float) -> int:
    """Fewest answers that can show `quality`, were there no fault: quality^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(quality))


def p_value(losses: Tensor, limit: float) -> float:
    """Of the hypothesis that the mean of losses in [0, 1] is above `limit`; Hoeffding-Bentkus.

        min(exp(-n h(min(m, limit), limit)), e P[Binomial(n, limit) <= ceil(n m)])

    with m the mean of the n losses and h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)).
    Learn then test (https://arxiv.org/abs/2110.01052, section 3.2); a plain binomial tail would
    hold only for losses that are 0 or 1.
    """
    n, mean = len(losses), losses.double().mean().item()
    low = min(mean, limit)
    apart = (1 - low) * math.log((1 - low) / (1 - limit))
    apart += low * math.log(low / limit) if low else 0.0
    tail = binomial_tail(math.ceil(n * mean - 1e-9), n, limit)
    return min(1.0, math.exp(-n * apart), math.e * tail)


def binomial_tail(most: int, n: int, share: float) -> float:
    """P[Binomial(n, share) <= most]."""
    logs = (
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(share)
        + (n - k) * math.log1p(-share)
        for k in range(min(most, n) + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def most_faults(n: int, quality: float, confidence: float) -> int:
    """The most of `n` answers that may differ and still show `quality`; -1 where none may.

    For answers that are the same or not, so that the binomial tail is exact:
    max {k: P[Binomial(n, 1 - quality) <= k] <= 1 - confidence}.
    """
    faults = -1
    while faults + 1 < n and binomial_tail(faults + 1, n, 1 - quality) <= 1 - confidence:
        faults += 1
    return faults


def at_least(faults: int, n: int, confidence: float) -> float:
    """The share of right answers that `faults` wrong ones among `n` show (Clopper and Pearson)."""
    low, high = faults / n, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if middle < 1 and binomial_tail(faults, n, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return 1 - high


def check_wish(name: str, value: float) -> None:
    """Raises `UsageError` unless 0 < value < 1."""
    if math.isnan(value):
        raise UsageError(f"{name} is no number; give one in (0, 1), such as 0.95.")
    if not 0 < value < 1:
        raise UsageError(
            f"{name} is {value}, but must lie in (0, 1): no finite set could show more."
        )


def check_count(answers: int, quality: float, confidence: float) -> None:
    """Raises `UsageError` where so many answers cannot show `quality`."""
    least = needed(quality, confidence)
    if answers < least:
        raise UsageError(
            f"{answers} answers cannot show a quality of {quality} with a confidence of "
            f"{confidence}, even without a fault; give {least} or more, or ask for less."
        )
