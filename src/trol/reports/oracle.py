"""The files of `trol oracle`: `oracle.json`, its curve as `oracle.png`, and the page `oracle.html`.

The results are those of `trol oracle --json`: the report of `trol.evaluation.oracle_report`, and
`model`, `task`, `split`, `scope` and `run` beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from trol.evaluation.answers import LOWER_IS_BETTER
from trol.evaluation.oracle_report import RIGHT, score_text
from trol.files import write_whole
from trol.reports import pages
from trol.reports.pages import PAGE_INK, STYLE, Results, Table, percent

ORACLE = Results(
    "oracle.json",
    "oracle.html",
    "trol oracle",
    ("model", "task", "metric", "menu", "full", "equal_budget", "curve", "controls"),
)

ARMS = {
    "oracle": ("oracle, reference at hand", pages.BLUE, "-"),
    "held_out": ("by question type, held out", pages.GREEN, "-."),
    "single": ("best single level", PAGE_INK, ":"),
    "random": ("oracle's levels dealt at random", pages.ORANGE, "--"),
}
"""How the level of a sequence is chosen, as the curve calls it -> name, colour, line."""

FEW = 100
"""Sequences below which an oracle's figures say little."""

PAPERS_SHARE = 0.233
"""Of 24 layers, which equals the full model in arXiv 2410.20022."""


def write(results: Mapping[str, Any], out: str | Path) -> Path:
    """Writes the three files into the folder `out`, results first; see `Results.write`."""

    def page(place: Path) -> str:
        write_whole(place / "oracle.png", pages.as_png(curve(results, (7.2, 4.2))))
        return render(results)

    return ORACLE.write(results, out, page)


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    charts = {
        "curve": pages.as_svg(curve(results, (7.2, 3.8)), "oracle-curve"),
        "mix": pages.as_svg(mix(results), "oracle-mix"),
    }
    values = {"charts": charts, "tables": tables_of(results), "run": results.get("run", {})}
    return pages.render("oracle.html", results=results, score_text=score_text, **values)


def tables_of(results: Mapping[str, Any]) -> list[Table]:
    """How many layers the oracle needs, and the same budgets spent without the reference."""
    return [_budgets(results), _controls(results)]


def _budgets(results: Mapping[str, Any]) -> Table:
    metric, n, outputs = results["metric"], results["n"], results["controls"]["best_of_n"]
    points = {
        "as good as the full model in the mean": results["equal_budget"],
        "the cheapest level as good for each sequence": results["per_sequence"],
        "the best level for each sequence": results["best"],
    }
    for name, part in (results.get("by_full") or {}).items():
        if part is not None:
            points[f"the same for the {part['n']} that the full model has {name}"] = part
    if outputs is not None:
        name = f"as good as the best of {outputs['n']} outputs of the full model"
        points[name] = outputs["oracle_reaches"]
    rows = [
        [name, "–", "no budget", "", ""]
        if point is None
        else [
            name,
            f"{point['layers']:.2f}",
            percent(point["share"]),
            "",
            score_text(metric, point["score"]),
        ]
        for name, point in points.items()
    ]
    rows[0][3] = " to ".join(map(percent, results["equal_shares"]))
    rows.append(
        [
            "as good as the full model in arXiv 2410.20022, of 24 layers",
            "",
            percent(PAPERS_SHARE),
            "",
            "",
        ]
    )
    notes = [
        f"One model, {n} questions, one menu of {len(results['menu'])} levels: others give other "
        "figures. The interval holds 95 % of resamples of these questions."
    ]
    if results["full"] <= 0 and not _is_loss(metric):
        notes.append(
            f"The full model scores nothing by {metric} on this set, so every level equals it and "
            "the figures mean nothing; take a model that can do the task."
        )
    if n < FEW:
        notes.append(f"Fewer than {FEW} questions say little; ask more with --questions.")
    if results.get("by_full"):
        notes.append(
            f"The full model has an answer right if it scores {RIGHT:.0%} or more. Where it is "
            "wrong, any level may be as good as it is: what that saves is no saving."
        )
    if any(map(_is_loss, results["metrics"])):
        notes.append("In oracle.json a loss has its sign turned, so that higher is better.")
    heading = ["the oracle is", f"layers of {results['layers']}", "share", "95 % interval", metric]
    return Table(heading, rows, notes)


def _controls(results: Mapping[str, Any]) -> Table:
    metric, controls, full = results["metric"], results["controls"], results["full"]
    budgets, outputs = (
        (controls["at_equal_budget"], controls["at_full_budget"]),
        controls["best_of_n"],
    )
    reach = {"oracle": results["equal_budget"]["share"], **controls["reach_full"]}
    rows = []
    for arm, (name, _, _) in ARMS.items():
        scores = [score_text(metric, budget[arm]) for budget in budgets]
        if arm == "random":
            spreads = [_difference(metric, budget["random_spread"]) for budget in budgets]
            scores = [
                f"{a} ± {b[1:].removesuffix(' nats')}" for a, b in zip(scores, spreads, strict=True)
            ]
        share = "never" if reach[arm] is None else percent(reach[arm])
        rows.append([name, *scores, _difference(metric, budgets[1][arm] - full), share])
    rows.append(["full model", "", score_text(metric, full), "", percent(1)])
    notes = [
        "± is the standard deviation over random allocations. The best single level is chosen on "
        "the sequences that it is scored on; levels by type on the other half. A budget counts the "
        "chosen output alone: the oracle also made all others, and so did the best of several."
    ]
    if outputs is not None:
        share, gain = outputs["share_of_gain"], _difference(metric, outputs["score"] - full)
        gain += "" if share is None else f" ({percent(share)} of the oracle's)"
        name = f"best of {outputs['n']} outputs of the full model"
        rows.append([name, "", score_text(metric, outputs["score"]), gain, ""])
    else:
        why = "a loss belongs to the reference" if _is_loss(metric) else "--samples is 0"
        notes.append(f"What choosing among outputs alone gains was not measured: {why}.")
    at = f"at {percent(results['equal_budget']['share'])} of the layers"
    heading = [
        "who chooses the level",
        at,
        "at all layers",
        "gain",
        "layers to equal the full model",
    ]
    return Table(heading, rows, notes)


def _is_loss(metric: str) -> bool:
    return metric in LOWER_IS_BETTER


def _difference(metric: str, value: float) -> str:
    """A difference of scores with its sign, positive where it is an improvement."""
    text = f"{value:+.3f} nats" if _is_loss(metric) else f"{100 * value:+.1f}"
    return text.replace("-", "−")


@rc_context(STYLE)
def curve(results: Mapping[str, Any], size: tuple[float, float]) -> Figure:
    """Score against layers for the oracle and its controls, the full model as a line."""
    metric, outputs = results["metric"], results["controls"]["best_of_n"]
    x = f"layers per token of the answer, mean over sequences (of {results['layers']})"
    y = metric + (" (nats)" if _is_loss(metric) else " (× 100)")
    figure, (axes,) = pages.new_axes(size, x, y)

    def plotted(score: float) -> float:
        return -score if _is_loss(metric) else 100 * score

    layers = [point["layers"] for point in results["curve"]]
    for arm, (name, color, line) in ARMS.items():
        values = [plotted(point[arm]) for point in results["curve"]]
        # A single level buys nothing between its cost and the next one's.
        style = "steps-post" if arm == "single" else "default"
        axes.plot(layers, values, line, color=color, label=name, linewidth=1.5, drawstyle=style)
    full = plotted(results["full"])
    axes.axhline(full, color=pages.GREY, linewidth=0.9)
    axes.annotate(
        "full model",
        (0.01, full),
        xycoords=("axes fraction", "data"),
        va="bottom",
        fontsize=8,
        color=pages.GREY,
    )
    if outputs is not None:
        dashes = {"color": pages.PURPLE, "linewidth": 0.9, "linestyle": (0, (4, 2))}
        label = f"best of {outputs['n']}, full depth"
        axes.axhline(plotted(outputs["score"]), label=label, **dashes)
    equal = results["equal_budget"]
    axes.plot(equal["layers"], full, "o", color=pages.BLUE, markersize=6)
    axes.annotate(
        f"{equal['layers']:.2f} layers = {percent(equal['share'])}",
        (equal["layers"], full),
        xytext=(7, -12),
        textcoords="offset points",
        fontsize=8,
    )
    if _is_loss(metric):
        axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.17))
    return figure


@rc_context(STYLE)
def mix(results: Mapping[str, Any]) -> Figure:
    """The share of sequences on each level where the oracle equals the full model."""
    figure, (axes,) = pages.new_axes((4.4, 2.5), "level (layers)", "sequences (%)")
    places = range(len(results["menu"]))
    axes.bar(places, [100 * share for share in results["mix"]], color=pages.BLUE, alpha=0.75)
    axes.set_xticks(places, [str(level["cost"]) for level in results["menu"]])
    return figure
