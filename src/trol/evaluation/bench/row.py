"""The rows that suites give: what was measured, beside the limit that it is held against."""

from __future__ import annotations

import statistics
from typing import Any

from trol.evaluation.timing import Timing, ratio_and_spread

Row = dict[str, Any]
"""`{"case", "baseline_ms", "measured_ms", "limit_ms", "ratio", "spread", "must", "limit",
"noisy"}`: medians in milliseconds; ratio = measured / limit, the median over rounds, spread half
its interquartile range; `must` is the most that the ratio may be, None where nothing is promised;
`limit` says in words what the limit is."""

NOISE = 0.05
"""A spread above this share of the ratio makes a row noisy."""


def row(
    case: str,
    baseline_ms: list[float],
    measured_ms: list[float],
    limits_ms: list[float],
    *,
    limit: str,
    must: float | None,
) -> Row:
    """A row of times, one for each round."""
    ratio, spread = ratio_and_spread(limits_ms, measured_ms)
    return {
        "case": case,
        "baseline_ms": statistics.median(baseline_ms),
        "measured_ms": statistics.median(measured_ms),
        "limit_ms": statistics.median(limits_ms),
        "ratio": ratio,
        "spread": spread,
        "must": must,
        "limit": limit,
        "noisy": spread > NOISE * abs(ratio),
    }


def figure_row(case: str, ratio: float, *, limit: str, must: float | None) -> Row:
    """A row of something that is no time."""
    times: Row = dict.fromkeys(("baseline_ms", "measured_ms", "limit_ms"))
    told = {"ratio": ratio, "spread": 0.0, "must": must, "limit": limit, "noisy": False}
    return {"case": case, **times, **told}


def memory_row(case: str, bare: list[Timing], measured: list[Timing]) -> Row | None:
    """The most memory held on a GPU, to the bare host's; None without a GPU."""
    peaks = [max(t.peak_bytes or 0 for t in times) for times in (bare, measured)]
    if not all(peaks):
        return None
    told = figure_row(case, peaks[1] / peaks[0], limit="the bare host's peak", must=None)
    return {**told, "baseline_bytes": peaks[0], "measured_bytes": peaks[1]}


def phase_of(times: list[Timing], phase: str) -> list[float]:
    """The milliseconds of `prefill` or `decode`, round by round."""
    return [getattr(one, phase) for one in times]
