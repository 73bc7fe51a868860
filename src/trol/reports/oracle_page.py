"""The files of an oracle: `oracle.json`, its curve as `oracle.png`, and the page `oracle.html`.

The results are those of `trol oracle --json`: the report of `trol.evaluation.oracle_report`, and
`model`, `task`, `split`, `scope` and `run` beside it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from trol.errors import UsageError
from trol.evaluation.answers import LOWER_IS_BETTER
from trol.evaluation.oracle_report import score_text
from trol.files import folder, write_json, write_whole
from trol.reports import pages
from trol.reports.charts import ARM_COLORS, GREY, PAGE_INK, STYLE, as_svg, new_axes

NEEDED = ("model", "task", "metric", "menu", "full", "equal_budget", "curve", "controls", "verdict")

ARMS = {
    "oracle": ("oracle, reference at hand", ARM_COLORS["on"], "-"),
    "held_out": ("by question type, held out", ARM_COLORS["twin"], "-."),
    "single": ("best single level", PAGE_INK, ":"),
    "random": ("oracle's levels dealt at random", ARM_COLORS["off"], "--"),
}
"""What the curve holds: arm -> name, colour, line."""


def write(results: Mapping[str, Any], out: str | Path) -> Path:
    """Writes the three files into the folder `out`, results first; returns the page's path.

    Where the page fails, that is a warning, and the path is that of the results.

    Raises:
        UsageError: the results are no finished oracle's, or the folder cannot be made.
    """
    missing = [key for key in NEEDED if key not in results]
    if missing:
        raise UsageError(f"the results of an oracle lack {', '.join(missing)}; run it again.")
    place = folder(out)
    kept = write_json(place / "oracle.json", results)
    with pages.beside(kept):
        picture = io.BytesIO()
        with rc_context(STYLE):
            curve(results, (7.2, 4.2)).savefig(picture, format="png", dpi=160, facecolor="white")
        write_whole(place / "oracle.png", picture.getvalue())
        return write_whole(place / "oracle.html", render(results))
    return kept


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("trol.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["shown"] = score_text
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    with rc_context(STYLE):
        charts = {
            "curve": as_svg(curve(results, (7.2, 3.8)), "oracle-curve"),
            "mix": as_svg(mix(results), "oracle-mix"),
        }
    return environment.get_template("oracle.html.j2").render(
        results=results, charts=charts, arms=ARMS, run=results.get("run", {})
    )


def curve(results: Mapping[str, Any], size: tuple[float, float]) -> Figure:
    """Score against layers for the oracle and its controls, the full model as a line."""
    figure, axes = new_axes(*size)
    points, outputs = results["curve"], results["controls"]["best_of_n"]
    layers = [point["layers"] for point in points]
    for arm, (name, color, line) in ARMS.items():
        values = [_plotted(results["metric"], point[arm]) for point in points]
        # A single level buys nothing between its cost and the next one's.
        style = "steps-post" if arm == "single" else "default"
        axes.plot(layers, values, line, color=color, label=name, linewidth=1.5, drawstyle=style)
    full = _plotted(results["metric"], results["full"])
    axes.axhline(full, color=GREY, linewidth=0.9)
    axes.annotate(
        "full model",
        (0.01, full),
        xycoords=("axes fraction", "data"),
        va="bottom",
        fontsize=8,
        color=GREY,
    )
    if outputs is not None:
        color = "#b0568f"
        score = _plotted(results["metric"], outputs["score"])
        axes.axhline(score, color=color, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.plot([], [], color=color, linestyle="--", label=f"best of {outputs['n']}, full depth")
    equal = results["equal_budget"]
    axes.plot(equal["layers"], full, "o", color=ARM_COLORS["on"], markersize=6)
    axes.annotate(
        f"{equal['layers']:.2f} layers = {100 * equal['share']:.1f} %",
        (equal["layers"], full),
        xytext=(7, -12),
        textcoords="offset points",
        fontsize=8,
    )
    axes.set_xlabel(f"layers per token of the answer, mean over sequences (of {results['layers']})")
    axes.set_ylabel(results["metric"] + (" (nats)" if _is_loss(results["metric"]) else " (× 100)"))
    if _is_loss(results["metric"]):
        axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.17))
    return figure


def mix(results: Mapping[str, Any]) -> Figure:
    """The share of sequences on each level where the oracle equals the full model."""
    figure, axes = new_axes(4.4, 2.5)
    places = range(len(results["menu"]))
    axes.bar(places, [100 * share for share in results["mix"]], color=ARM_COLORS["on"], alpha=0.75)
    axes.set_xticks(places, [str(level["cost"]) for level in results["menu"]])
    axes.set_xlabel("level (layers)")
    axes.set_ylabel("sequences (%)")
    return figure


def _plotted(metric: str, score: float) -> float:
    return -score if _is_loss(metric) else 100 * score


def _is_loss(metric: str) -> bool:
    return metric in LOWER_IS_BETTER
