"""The files of `trol curve`: `curve.json`, its charts as PNG, and the page `curve.html`.

The results are those that `trol.evaluation.curves.curve` gives, with `model` and `run` beside
them; nothing else is read. Charts are named `TASK-visits.png`, `TASK-flops.png`, `TASK-time.png`
and, of the hidden states at half of the visits, `TASK-cosine.png`.

Quality against cost, a line for each method with a band over seeds; cosines by layer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trol.errors import DataError
from trol.files import folder, write_json, write_whole
from trol.reports import pages
from trol.reports.charts import GREY, PAGE_INK, STYLE, as_svg, new_axes
from trol.reports.curve_words import FULL, cell, label, percent, saves, sentences, settings_told

# Okabe and Ito's, for colour-blind readers; the dashes tell apart what shares a colour.
STYLES: dict[str, tuple[str, Any]] = {
    "skip": ("#0a84d0", "-"),
    "exit": ("#e08a00", "-"),
    "random": (GREY, "--"),
    "middle": ("#56b4e9", "-."),
    "influence": ("#00986b", "-"),
    "greedy": ("#b0568f", "-"),
    "early_exit": ("#e08a00", "--"),
    "controller": ("#d55e00", "-"),
    "router": ("#00986b", "--"),
    "oracle": (PAGE_INK, ":"),
}
"""Method -> colour and line."""

COSTS = {
    "visits": ("visits_share", "layer visits per answer token"),
    "flops": ("flops_share", "FLOPs per answer token"),
    "time": ("ms_ratio", "time per answer token"),
}
"""Chart -> the points' entry, and what it is; all in percent of the full model's."""

HALF = 0.5
NEAR_HALF = 0.15
"""How far from half of the visits a point may lie whose cosines are shown."""


def quality(task: Mapping[str, Any], cost: str) -> Figure:
    """The metric that judges the task, and the loss, against one cost."""
    metrics = drawn_metrics(task)
    with rc_context(STYLE):
        figure, axes = _panels(len(metrics))
        key, what = COSTS[cost]
        for place, metric in zip(axes, metrics, strict=True):
            for method, drawn in task["methods"].items():
                _line(place, method, drawn, metric, key)
            place.set_xlabel(f"{what} (% of the full model's)")
            place.set_ylabel("loss (nats per token)" if metric == "loss" else f"{metric} (× 100)")
        _legend(figure, axes)
        return figure


def drawn_metrics(task: Mapping[str, Any]) -> list[str]:
    """The metric that judges, and the loss where it is another."""
    first = next(iter(task["metrics"]))
    return list(dict.fromkeys([first, *(m for m in task["metrics"] if m == "loss")]))


def cosines(task: Mapping[str, Any]) -> Figure | None:
    """Cosine to the full model's hidden state after each layer, at about half of the visits."""
    points = {
        method: point
        for method, drawn in task["methods"].items()
        if (point := nearest_half(drawn)) is not None
    }
    if not points:
        return None
    with rc_context(STYLE):
        figure, axes = _panels(1)
        for method, point in points.items():
            color, line = STYLES.get(method, (GREY, "-"))
            share = percent(point["visits_share"]["mean"])
            layers = range(1, len(point["cosines"]) + 1)
            style = {"color": color, "linestyle": line, "linewidth": 1.5, "marker": "."}
            axes[0].plot(layers, point["cosines"], label=f"{method}, {share}", **style)
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_xlabel("after layer")
        axes[0].set_ylabel("cosine to the full model")
        _legend(figure, axes)
        return figure


def nearest_half(drawn: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point whose visits are nearest to half of the full model's, if one is near."""

    def distance(point: Mapping[str, Any]) -> float:
        return abs(point["visits_share"]["mean"] - HALF)

    points = [p for p in drawn["points"] if p["cosines"] is not None and p["settings"] != FULL]
    nearest = min(points, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= NEAR_HALF else None


def as_png(figure: Figure) -> bytes:
    """The figure on white."""
    out = io.BytesIO()
    figure.patch.set_alpha(1)
    with rc_context(STYLE):
        figure.savefig(out, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    figure.patch.set_alpha(0)
    return out.getvalue()


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with `count` axes side by side, drawn as all charts are."""
    figure, first = new_axes(4.6 * count, 3.5)
    if count == 1:
        return figure, [first]
    first.remove()
    axes = list(figure.subplots(1, count))
    for one in axes:
        one.patch.set_alpha(0)
        one.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def _line(axes: Any, method: str, drawn: Mapping[str, Any], metric: str, key: str) -> None:
    """Mean by mean cost, with the spread over seeds; the full model as a dot."""
    points = [p for p in drawn["points"] if p[key] is not None and metric in p["metrics"]]
    if not points:
        return
    scale = 1 if metric == "loss" else 100
    costs = [100 * point[key]["mean"] for point in points]
    means = [scale * point["metrics"][metric]["mean"] for point in points]
    spreads = [scale * (point["metrics"][metric]["spread"] or 0) for point in points]
    color, line = STYLES.get(method, (GREY, "-"))
    mark = "" if drawn["bound"] else "."
    style = {"color": color, "linestyle": line, "linewidth": 1.4, "marker": mark, "markersize": 5}
    axes.plot(costs, means, label=label(method, drawn), **style)
    if costs == sorted(costs):
        low, high = (
            [mean + side * spread for mean, spread in zip(means, spreads, strict=True)]
            for side in (-1, 1)
        )
        axes.fill_between(costs, low, high, color=color, alpha=0.14, linewidth=0)
    else:  # a line that turns back would cover its own band
        axes.errorbar(costs, means, spreads, color=color, fmt="none", alpha=0.5, linewidth=1)
    if points[-1]["settings"] == FULL:
        axes.plot(costs[-1], means[-1], "o", color=PAGE_INK, markersize=4.5, zorder=5)


def _legend(figure: Figure, axes: list[Any]) -> None:
    shown = {
        label: handle
        for one in axes
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(shown.values()),
        list(shown),
        fontsize=8,
        ncols=min(len(shown), 4 * len(axes) - 1),
        loc="outside upper center",
    )


NEEDED = ("model", "scope", "layers", "seeds", "questions", "device", "timing", "tasks", "run")
FILE, PAGE = "curve.json", "curve.html"


def write(results: Mapping[str, Any], out: str | Path) -> Path:
    """Writes results, then charts and page into the folder `out`; returns the page's path.

    Where the page fails, that is a warning, and the path is that of the results.

    Raises:
        DataError: the results are no curves.
        UsageError: the folder cannot be made.
    """
    check(results)
    place = folder(out)
    kept = write_json(place / FILE, results)
    with pages.beside(kept):
        for name, task in results["tasks"].items():
            for chart, figure in figures(task).items():
                write_whole(place / f"{slug(name)}-{chart}.png", as_png(figure))
        return write_whole(place / PAGE, render(results))
    return kept


def read(path: str | Path) -> dict[str, Any]:
    """The results in a folder or a file that `trol curve` wrote.

    Raises:
        DataError: there are none, or they are damaged.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} tells of no curves: {error}; run `trol curve` again.") from error


def check(results: Mapping[str, Any]) -> None:
    """Raises `DataError` where the results are no curves."""
    if missing := [key for key in NEEDED if key not in results]:
        raise DataError(f"the results of curves lack {', '.join(missing)}; run `trol curve` again.")


def render(results: Mapping[str, Any]) -> str:
    """The page; raises `DataError` where the results are no curves."""
    check(results)
    return pages.render(
        "curve",
        results=results,
        charts={
            name: {
                chart: as_svg(figure, f"{slug(name)}-{chart}")
                for chart, figure in figures(task).items()
            }
            for name, task in results["tasks"].items()
        },
        verdicts={name: sentences(results, name) for name in results["tasks"]},
        tables={name: table(task) for name, task in results["tasks"].items()},
        run=results["run"],
    )


def figures(task: Mapping[str, Any]) -> dict[str, Any]:
    """Chart name -> figure: quality against each cost, and cosines where there are any."""
    found = {cost: quality(task, cost) for cost in COSTS}
    shown = cosines(task)
    return found if shown is None else {**found, "cosine": shown}


def table(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each point: costs in percent of the full model's, then all metrics."""
    return [
        {
            "method": label(method, drawn),
            "settings": settings_told(point["settings"]),
            "costs": [
                cell(point[key], percent=True)
                for key in ("visits_share", "flops_share", "ms_ratio", "prefill_ms_ratio")
            ],
            "slow": point["ms_ratio"] is not None
            and point["visits_share"]["mean"] < 1 - 1e-6
            and not saves(point),
            "metrics": [cell(point["metrics"].get(metric)) for metric in task["metrics"]],
        }
        for method, drawn in task["methods"].items()
        for point in drawn["points"]
    ]


def slug(name: str) -> str:
    """A task's name as part of a file's name: `alpaca:a/b.json` -> `alpaca-a-b.json`."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")
