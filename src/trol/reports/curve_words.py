"""What the points of curves allow to be said: which method wins where, and what saves no time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from trol.reports.charts import compare

FULL = {"plan": "all"}
"""Settings of the full model's point."""

SAME_SCORE = 5e-4
"""How far scores of the full model may lie apart that are equal as they are shown."""

Stat = Mapping[str, Any]

MANY = 6
FEW = "; so few seeds show large differences alone"
"""Below how many seeds something is said of ties, and what."""


def sentences(result: Mapping[str, Any], name: str) -> list[str]:
    """Who wins by the metric that judges a task, who keeps up with the full model, and time."""
    task = result["tasks"][name]
    metric = next(iter(task["metrics"]))
    told = [winners(task, metric)]
    if len(result["seeds"]) > 1:
        told.append(keeping_up(task, metric))
    return [*told, *without_saving(task, result["device"]), *other_questions(task)]


def other_questions(task: Mapping[str, Any]) -> list[str]:
    """Where an oracle was made on other questions than those measured here: which, and how hard."""
    return [
        f"The oracle was made on {on['n']} questions of the {on['split']} split, where the full "
        f"model scores {on['metric']} {on['full']:.3f} ({on['full_here']:.3f} here, {task['n']} "
        "questions for each seed of the test split): other questions, so compare its line with "
        "its own full model alone."
        for drawn in task["methods"].values()
        if (on := drawn.get("made_on")) is not None
        and (
            (on["n"], on["split"]) != (task["n"], "test")
            or abs(on["full"] - on["full_here"]) > SAME_SCORE
        )
    ]


def label(method: str, drawn: Mapping[str, Any]) -> str:
    """A method as charts and tables call it."""
    return f"{method} (sees the references)" if drawn["bound"] else method


def winners(task: Mapping[str, Any], metric: str) -> str:
    """Which methods have the highest score at equal layer visits, from few visits to many.

    Methods are compared seed by seed. Between two points of a method its scores lie on a line,
    which is what choosing one of the two by lot for each question gives.
    """
    sign = _sign(task, metric)
    lines = {m: _line(drawn, metric) for m, drawn in task["methods"].items() if not drawn["bound"]}
    if len(lines) < 2:
        return f"{metric}: one method alone, so there is nothing to compare it with."
    seeds = max(len(values) for line in lines.values() for _, values in line)
    if seeds == 1:
        return (
            f"{metric}: one seed, so no spread and no winner; take --seeds 3 or more to name one."
        )
    best = [(share, _best(lines, share, sign)) for share in _shares(task)]
    found = [(share, won) for share, won in best if won is not None]
    groups = [
        (won, [share for share, _ in some])
        for won, some in groupby(found, key=lambda pair: _team(pair[1]))
    ]
    parts = [f"{_where(groups, number)}: {won}" for number, (won, _) in enumerate(groups)]
    if not parts:
        return f"{metric}: no two methods have points at equal layer visits."
    return (
        f"{metric} by layer visits: {'; '.join(parts)}. A tie is a paired difference over "
        f"{seeds} seeds whose 95 % interval holds zero{FEW if seeds < MANY else ''}."
    )


def keeping_up(task: Mapping[str, Any], metric: str) -> str:
    """For each method, the fewest visits from which on it is not shown to be worse than all."""
    sign = _sign(task, metric)
    parts: list[str] = []
    for method, drawn in task["methods"].items():
        points = [point for point in drawn["points"] if metric in point["metrics"]]
        if drawn["bound"] or not points:
            continue
        full = points[-1]["metrics"][metric]["values"]
        reached = points[-1]["visits_share"]["mean"]
        for point in reversed(points[:-1]):
            found = compare(full, point["metrics"][metric]["values"])
            if found.shown and sign * found.mean > 0:
                break
            reached = point["visits_share"]["mean"]
        parts.append(f"{method} {percent(reached)}")
    return (
        f"Not shown to be worse than the full model in {metric}, from this share of the layer "
        f"visits on: {', '.join(parts)}."
    )


def without_saving(task: Mapping[str, Any], device: str) -> list[str]:
    """The methods whose points with fewer layer visits took no less time than the full model."""
    cheaper = {
        method: [
            point
            for point in drawn["points"]
            if point["ms_ratio"] is not None and point["visits_share"]["mean"] < 1 - 1e-6
        ]
        for method, drawn in task["methods"].items()
    }
    slow = {m: [point for point in points if not saves(point)] for m, points in cheaper.items()}
    where = f"on this device ({device}), one question at a time"
    if not any(cheaper.values()):
        return []
    if not any(slow.values()):
        return [f"Every point with fewer layer visits also took less time per token {where}."]
    told = [
        f"{method} ({_among(points, cheaper[method])})" for method, points in slow.items() if points
    ]
    return [f"Saves no time per token {where}: {'; '.join(told)}."]


def saves(point: Mapping[str, Any]) -> bool:
    """Whether a point's time lies below the full model's by more than it scatters over seeds."""
    ratio = point["ms_ratio"]
    return ratio["mean"] + (ratio["spread"] or 0) < 1


def settings_told(settings: Mapping[str, Any]) -> str:
    """A point's settings in few words."""
    if settings == FULL:
        return "all layers"
    if "plans" in settings:
        return "another plan for each seed"
    return ", ".join(
        str(value) if name in ("plan", "adapter", "oracle", "measure") else f"{name} {value}"
        for name, value in settings.items()
    )


def percent(share: float) -> str:
    """A share as people read it."""
    return f"{100 * share:.3g} %"


def cell(stat: Stat | None, *, percent: bool = False) -> str:
    """Mean and spread with three decimals, or as percent; a dash where it is not known."""
    if stat is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, 3)
    mean = f"{scale * stat['mean']:.{digits}f}"
    return mean if stat["spread"] is None else f"{mean} ± {scale * stat['spread']:.{digits}f}"


def _among(points: Sequence[Any], of: Sequence[Any]) -> str:
    if len(points) == len(of) > 1:
        return f"all {len(of)} points"
    return ", ".join(f"{percent(p['visits_share']['mean'])} of the visits" for p in points)


def _sign(task: Mapping[str, Any], metric: str) -> int:
    return -1 if task["metrics"][metric]["better"] == "lower" else 1


def _line(drawn: Mapping[str, Any], metric: str) -> list[tuple[float, list[float]]]:
    """(share of the visits, score of each seed), the shares rising, each of them once."""
    points = [
        (round(point["visits_share"]["mean"], 6), point["metrics"][metric]["values"])
        for point in drawn["points"]
        if metric in point["metrics"]
    ]
    points.sort(key=lambda point: point[0])
    return [
        (share, [statistics.fmean(seed) for seed in zip(*(v for _, v in some), strict=True)])
        for share, several in groupby(points, key=lambda point: point[0])
        if (some := list(several))
    ]


def _shares(task: Mapping[str, Any]) -> list[float]:
    """The shares at which methods are compared: those of points that were asked for."""
    points = [
        p for drawn in task["methods"].values() if not drawn["bound"] for p in drawn["points"]
    ]
    asked = [point for point in points if point["keep"] is not None and point["settings"] != FULL]
    chosen = asked or [point for point in points if point["settings"] != FULL]
    return sorted({round(point["visits_share"]["mean"], 6) for point in chosen})


def _best(
    lines: Mapping[str, Sequence[tuple[float, list[float]]]], share: float, sign: int
) -> tuple[list[str], int] | None:
    """The method of the best mean and those it is not shown to beat, and how many there were."""
    here = {
        method: [
            float(np.interp(share, [x for x, _ in line], values))
            for values in zip(*(values for _, values in line), strict=True)
        ]
        for method, line in lines.items()
        if line and line[0][0] <= share + 1e-9
    }
    if len(here) < 2:
        return None
    order = sorted(here, key=lambda method: -sign * statistics.fmean(here[method]))
    first = here[order[0]]
    tied = [method for method in order[1:] if not compare(first, here[method]).shown]
    return [order[0], *tied], len(here)


def _team(won: tuple[list[str], int]) -> str:
    methods, among = won
    if len(methods) == among:
        return "no difference is shown"
    if len(methods) == 1:
        return methods[0]
    names = sorted(methods)
    return f"{', '.join(names[:-1])} and {names[-1]} (a tie)"


def _where(groups: Sequence[tuple[str, Sequence[float]]], number: int) -> str:
    """A run of shares in words; the first one begins at the fewest layers, the last ends at all."""
    low, high = groups[number][1][0], groups[number][1][-1]
    if len(groups) == 1:
        return "everywhere"
    if number == 0:
        return f"up to {percent(high)} of the layers"
    if number == len(groups) - 1:
        return f"from {percent(low)}"
    return f"at {percent(low)}" if low == high else f"from {percent(low)} to {percent(high)}"
