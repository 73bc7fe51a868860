"""The files of `trol curve`: `curve.json`, its charts as PNG, and the page `curve.html`.

The results are those that `trol.evaluation.curve` gives, with `model` and `run` beside them;
nothing else is read. Charts are named `TASK-visits.png`, `TASK-flops.png`, `TASK-time.png` and, of
the hidden states at half of the visits, `TASK-cosine.png`.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trol.files import write_whole
from trol.reports import pages
from trol.reports.pages import PAGE_INK, STYLE, Results, Table

CURVE = Results(
    "curve.json",
    "curve.html",
    "trol curve",
    ("model", "scope", "layers", "seeds", "questions", "device", "timing", "tasks", "run"),
)

FULL = {"plan": "all"}
"""Settings of the full model's point."""

# What shares a colour is told apart by its dashes.
LINES: dict[str, tuple[str, Any]] = {
    "skip": (pages.BLUE, "-"),
    "exit": (pages.ORANGE, "-"),
    "random": (pages.GREY, "--"),
    "middle": (pages.SKY, "-."),
    "influence": (pages.GREEN, "-"),
    "greedy": (pages.PURPLE, "-"),
    "early_exit": (pages.ORANGE, "--"),
    "controller": (pages.RED, "-"),
    "router": (pages.GREEN, "--"),
    "oracle": (PAGE_INK, ":"),
}
"""Method -> colour and line."""

COSTS = {
    "visits": ("visits_share", "layer visits per answer token"),
    "flops": ("flops_share", "FLOPs per answer token"),
    "time": ("ms_ratio", "time per answer token"),
}
"""Chart -> the points' entry, and what it is; all in percent of the full model's."""

EXIT = "exit"
"""The method that leaves the last layers out, which the others are compared with."""

HALF, NEAR_HALF = 0.5, 0.15
"""The share of the visits at which cosines are shown, and how far a point may lie from it."""

SAME_SCORE = 5e-4
"""How far apart scores of the full model may lie that are equal as they are shown."""

FEW_SEEDS = 6
"""Seeds below which intervals are wide."""


def write(results: Mapping[str, Any], out: str | Path) -> Path:
    """Writes results, page and charts into the folder `out`; see `Results.write`."""

    def page(place: Path) -> str:
        for name, task in results["tasks"].items():
            for chart, figure in figures(task).items():
                write_whole(place / f"{slug(name)}-{chart}.png", pages.as_png(figure))
        return render(results)

    return CURVE.write(results, out, page)


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    tasks = results["tasks"]
    charts = {
        name: {
            chart: pages.as_svg(figure, f"{slug(name)}-{chart}")
            for chart, figure in figures(task).items()
        }
        for name, task in tasks.items()
    }
    tables = {name: tables_of(task) for name, task in tasks.items()}
    values = {"charts": charts, "tables": tables, "run": results["run"]}
    return pages.render("curve.html", results=results, **values)


def slug(name: str) -> str:
    """A task's name as part of a file's name: `alpaca:a/b.json` -> `alpaca-a-b.json`."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")


def tables_of(task: Mapping[str, Any], metrics: Sequence[str] | None = None) -> list[Table]:
    """Every point beside the full model, and the methods at equal layer visits.

    `metrics`: those shown of every point; by default all.
    """
    return [
        points_table(task, metrics or list(task["metrics"])),
        *(table for table in (equal_visits_table(task), beside_exit_table(task)) if table.rows),
    ]


def points_table(task: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    """Costs in percent of the full model's, metrics, and the difference to the full model.

    The difference is of the metric that judges the task, paired over seeds.
    """
    judge = next(iter(task["metrics"]))
    costs = {"visits_share": "visits %", "flops_share": "FLOPs %", "ms_ratio": "time %"}
    costs["prefill_ms_ratio"] = "question's time %"
    rows = []
    for method, drawn in task["methods"].items():
        full = drawn["points"][-1]["metrics"].get(judge)
        for point in drawn["points"]:
            cells = [cell(point[key], percent=True) for key in costs]
            cells[2] += "" if saves_time(point) else " *"
            scores = point["metrics"].get(judge)
            if point["settings"] == FULL or full is None or scores is None:
                to_full = "–"
            else:
                to_full = pages.compare(scores["values"], full["values"]).text()
            cells += [cell(point["metrics"].get(metric)) for metric in metrics]
            name = f"{label(method, drawn)} {settings_text(point['settings'])}"
            rows.append([name, *cells, to_full])
    notes = [
        "Costs are in percent of the full model's; ± is the standard deviation over seeds. * marks "
        f"fewer layer visits in no less time. The last column is the difference of {judge} to the "
        "full model, paired over seeds, with its 95 % interval."
    ]
    heading = ["method", *costs.values(), *metrics, f"{judge} − full"]
    return Table(heading, rows, [*notes, *_other_questions(task)])


def _other_questions(task: Mapping[str, Any]) -> list[str]:
    """Where an oracle was made on other questions than those measured here."""
    return [
        f"The oracle was made on {on['n']} questions of the {on['split']} split, where the full "
        f"model has {on['metric']} {on['full']:.3f}; on these {task['n']} of the test split it has "
        f"{on['full_here']:.3f}. Compare the oracle's line with its own full model alone."
        for drawn in task["methods"].values()
        if (on := drawn.get("made_on")) is not None
        and (
            (on["n"], on["split"]) != (task["n"], "test")
            or abs(on["full"] - on["full_here"]) > SAME_SCORE
        )
    ]


def equal_visits_table(task: Mapping[str, Any]) -> Table:
    """The methods at equal layer visits, the best one first, with paired differences to it.

    Between two points of a method its scores lie on a line, which is what choosing one of the two
    by lot for each question gives. A method that sees the references is left out.
    """
    judge = next(iter(task["metrics"]))
    sign = -1 if task["metrics"][judge]["better"] == "lower" else 1
    rows, seeds = [], 0
    for share, scores in _scores_at_equal_visits(task):
        order = sorted(scores, key=lambda method: -sign * statistics.fmean(scores[method]))
        for method in order if len(order) > 1 else ():
            best, own = scores[order[0]], scores[method]
            to_best = "best" if method == order[0] else pages.compare(own, best).text()
            rows.append([f"{100 * share:.3g} % {method}", f"{statistics.fmean(own):.3f}", to_best])
            seeds = len(best)
    notes = [
        f"Differences are paired over {seeds} seeds, with 95 % intervals: one that holds zero "
        "shows no difference."
    ]
    if seeds == 1:
        notes = ["One seed gives no interval, so no method is shown to be better; take --seeds 3."]
    elif seeds < FEW_SEEDS:
        notes.append("So few seeds show large differences alone.")
    return Table(["at equal visits", judge, "difference to the best"], rows, notes)


def beside_exit_table(task: Mapping[str, Any]) -> Table:
    """The paper's claim: other layers left out beside the last ones, at equal layer visits."""
    judge = next(iter(task["metrics"]))
    lower = task["metrics"][judge]["better"] == "lower"
    rows = []
    for share, scores in _scores_at_equal_visits(task) if EXIT in task["methods"] else ():
        for method in scores:
            if method == EXIT or share > 1 - 1e-6 or EXIT not in scores:
                continue
            compared = pages.compare(scores[method], scores[EXIT])
            better = "better" if (compared.mean < 0) == lower else "worse"
            verdict = "not shown" if compared.holds_zero else better
            name = f"{100 * share:.3g} % {label(method, task['methods'][method])}"
            rows.append([name, compared.text(), verdict])
    notes = [
        "Glavas et al. (arXiv 2410.20022) claim that leaving inner layers out keeps more of the "
        "quality than leaving the last ones out. Differences are paired over seeds, with 95 % "
        f"intervals; {'less' if lower else 'more'} is better."
    ]
    return Table([f"beside {EXIT}", f"{judge} − {EXIT}'s", "than exit"], rows, notes)


def _scores_at_equal_visits(
    task: Mapping[str, Any],
) -> list[tuple[float, dict[str, list[float]]]]:
    """Each share of the visits, with every method's scores of the seeds there."""
    judge = next(iter(task["metrics"]))
    lines = {
        method: _scores_by_share(drawn["points"], judge)
        for method, drawn in task["methods"].items()
        if not drawn["bound"]
    }
    return [
        (
            share,
            {
                method: [
                    float(np.interp(share, list(line), seed))
                    for seed in zip(*line.values(), strict=True)
                ]
                for method, line in lines.items()
                if line and min(line) <= share + 1e-9
            },
        )
        for share in _shares(task)
    ]


def _scores_by_share(points: Sequence[Mapping[str, Any]], metric: str) -> dict[float, list[float]]:
    """Share of the visits, rising -> score of each seed, the mean where several points have it."""
    several: dict[float, list[list[float]]] = {}
    for point in points:
        if metric in point["metrics"]:
            share = round(point["visits_share"]["mean"], 6)
            several.setdefault(share, []).append(point["metrics"][metric]["values"])
    return {
        share: [statistics.fmean(seed) for seed in zip(*several[share], strict=True)]
        for share in sorted(several)
    }


def _shares(task: Mapping[str, Any]) -> list[float]:
    """The shares at which methods are compared: those of points that were asked for."""
    points = [
        point
        for drawn in task["methods"].values()
        if not drawn["bound"]
        for point in drawn["points"]
        if point["settings"] != FULL
    ]
    chosen = [point for point in points if point["keep"] is not None] or points
    return sorted({round(point["visits_share"]["mean"], 6) for point in chosen})


def label(method: str, drawn: Mapping[str, Any]) -> str:
    """A method's name in charts and tables."""
    if drawn["bound"]:
        return f"{method} (sees the references)"
    return f"{method} (evenly spaced)" if method == "skip" else method


def saves_time(point: Mapping[str, Any]) -> bool:
    """Whether a point takes less time than the full model, by more than it scatters over seeds.

    True where that was not measured, or no fewer layers are visited.
    """
    ratio = point["ms_ratio"]
    if ratio is None or point["visits_share"]["mean"] >= 1 - 1e-6:
        return True
    return ratio["mean"] + (ratio["spread"] or 0) < 1


def settings_text(settings: Mapping[str, Any]) -> str:
    """A point's settings in few words."""
    if settings == FULL:
        return "all layers"
    if "plans" in settings:
        return "another plan for each seed"
    return ", ".join(
        str(value) if name in ("plan", "adapter", "oracle", "measure") else f"{name} {value}"
        for name, value in settings.items()
    )


def cell(stat: Mapping[str, Any] | None, *, percent: bool = False) -> str:
    """Mean and spread with three decimals, or as percent; a dash where it is not known."""
    if stat is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, 3)
    mean = f"{scale * stat['mean']:.{digits}f}"
    return mean if stat["spread"] is None else f"{mean} ± {scale * stat['spread']:.{digits}f}"


def figures(task: Mapping[str, Any]) -> dict[str, Figure]:
    """Chart -> figure: quality against each cost, and cosines where there are any."""
    charts = {cost: quality(task, cost) for cost in COSTS}
    points = {method: nearest_half(drawn) for method, drawn in task["methods"].items()}
    near = {method: point for method, point in points.items() if point is not None}
    return {**charts, "cosine": cosines(near)} if near else charts


@rc_context(STYLE)
def quality(task: Mapping[str, Any], cost: str) -> Figure:
    """The metric that judges the task, and the loss where it is another, against one cost."""
    metrics = list(dict.fromkeys([next(iter(task["metrics"])), *({"loss"} & set(task["metrics"]))]))
    key, what = COSTS[cost]
    x, size = f"{what} (% of the full model's)", (4.6 * len(metrics), 3.5)
    figure, axes = pages.new_axes(size, x, "", len(metrics))
    for place, metric in zip(axes, metrics, strict=True):
        for method, drawn in task["methods"].items():
            _line(place, method, drawn, metric, key)
        place.set_ylabel("loss (nats per token)" if metric == "loss" else f"{metric} (× 100)")
    _legend(figure, axes)
    return figure


@rc_context(STYLE)
def cosines(points: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Cosine to the full model's hidden state after each layer, of one point of each method."""
    figure, axes = pages.new_axes((4.6, 3.5), "after layer", "cosine to the full model")
    for method, point in points.items():
        color, line = LINES.get(method, (pages.GREY, "-"))
        name = f"{method}, {100 * point['visits_share']['mean']:.3g} %"
        style = {"color": color, "linestyle": line, "linewidth": 1.5, "marker": "."}
        axes[0].plot(range(1, len(point["cosines"]) + 1), point["cosines"], label=name, **style)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    return figure


def nearest_half(drawn: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point whose visits are nearest to half of the full model's, if one is near."""

    def distance(point: Mapping[str, Any]) -> float:
        return abs(point["visits_share"]["mean"] - HALF)

    points = [p for p in drawn["points"] if p["cosines"] is not None and p["settings"] != FULL]
    nearest = min(points, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= NEAR_HALF else None


def _line(axes: Any, method: str, drawn: Mapping[str, Any], metric: str, key: str) -> None:
    """Mean by mean cost, with the spread over seeds; the full model as a dot."""
    points = [p for p in drawn["points"] if p[key] is not None and metric in p["metrics"]]
    if not points:
        return
    scale = 1 if metric == "loss" else 100
    costs = [100 * point[key]["mean"] for point in points]
    means = np.array([scale * point["metrics"][metric]["mean"] for point in points])
    spreads = np.array([scale * (point["metrics"][metric]["spread"] or 0) for point in points])
    color, line = LINES.get(method, (pages.GREY, "-"))
    mark = "" if drawn["bound"] else "."
    style = {"color": color, "linestyle": line, "linewidth": 1.4, "marker": mark, "markersize": 5}
    axes.plot(costs, means, label=label(method, drawn), **style)
    if costs == sorted(costs):
        band = {"color": color, "alpha": 0.14, "linewidth": 0}
        axes.fill_between(costs, means - spreads, means + spreads, **band)
    else:  # a line that turns back would cover its own band
        axes.errorbar(costs, means, spreads, color=color, fmt="none", alpha=0.5, linewidth=1)
    if points[-1]["settings"] == FULL:
        axes.plot(costs[-1], means[-1], "o", color=PAGE_INK, markersize=4.5, zorder=5)


def _legend(figure: Figure, axes: list[Any]) -> None:
    """One legend for all panels, each method once."""
    handles = {
        label: handle
        for one in axes
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(handles), 4 * len(axes) - 1)
    where = {"fontsize": 8, "ncols": columns, "loc": "outside upper center"}
    figure.legend(list(handles.values()), list(handles), **where)
