"""Line and bar charts as inline SVG that takes the colour of the page's text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from trol.analysis.verdict import mean_spread

# Readable on light and on dark, and told apart by colour-blind readers (Okabe and Ito).
ARM_COLORS = {"on": "#0a84d0", "off": "#e08a00", "twin": "#00986b"}
ARM_NAMES = {"on": "traversal on", "off": "off at test time", "twin": "twin without"}
GREY = "#8b8f96"
# Drawn with this colour, then replaced: SVG inside a page can follow the page.
PAGE_INK = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": PAGE_INK,
    "axes.labelcolor": PAGE_INK,
    "axes.edgecolor": PAGE_INK,
    "xtick.color": PAGE_INK,
    "ytick.color": PAGE_INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


def new_axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure with one pair of axes, on no background."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def as_svg(figure: Figure, name: str) -> str:
    """`figure` as an SVG element; `name` keeps its ids apart from those of other charts."""
    out = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue().replace(PAGE_INK, "currentColor")
    return text[text.index("<svg") :]


def losses(stage: str, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Training loss of one stage: a thin line per seed, colour by arm. Nats per token by step."""
    with rc_context(STYLE):
        figure, axes = new_axes(4.4, 2.5)
        for arm, runs in arms.items():
            for number, run in enumerate(runs):
                label = ARM_NAMES.get(arm, arm) if number == 0 and len(arms) > 1 else None
                style = {"color": ARM_COLORS.get(arm, GREY), "linewidth": 1.1, "alpha": 0.8}
                axes.plot(run["steps"], run["losses"], label=label, **style)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_ylim(bottom=0)
        if len(arms) > 1:
            axes.legend(fontsize=8)
        return as_svg(figure, f"loss-{stage}")


def accuracies(
    types: Sequence[str],
    arms: Mapping[str, Sequence[Mapping[str, float]]],
    chance: Mapping[str, float],
) -> str:
    """Accuracy per question type: bars are means over seeds, dots the seeds, dashes chance.

    `chance` may lack types of which nobody knows it.
    """
    with rc_context(STYLE):
        figure, axes = new_axes(max(6.5, 1.0 * len(types)), 3.1)
        places = np.arange(len(types))
        width = 0.8 / len(arms)
        for index, (arm, seeds) in enumerate(arms.items()):
            at = places - 0.4 + width * (index + 0.5)
            means = [mean_spread([seed[t] for seed in seeds])[0] for t in types]
            color = ARM_COLORS.get(arm, GREY)
            label = ARM_NAMES.get(arm, arm)
            axes.bar(at, means, width * 0.92, color=color, alpha=0.72, label=label)
            if len(seeds) > 1:
                for seed in seeds:
                    axes.plot(at, [seed[t] for t in types], ".", color=PAGE_INK, markersize=3)
        label = "chance"
        for place, name in zip(places, types, strict=True):
            if name in chance:
                line = {"color": PAGE_INK, "linewidth": 1.1, "linestyles": "dashed"}
                axes.hlines(chance[name], place - 0.44, place + 0.44, label=label, **line)
                label = None
        axes.set_xticks(places, [name.replace("_", " ") for name in types])
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("accuracy")
        axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return as_svg(figure, "accuracy")


def gates(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Gate per layer: a dot per seed (mean over tokens) on a bar, 5th to 95th percentile."""
    with rc_context(STYLE):
        figure, axes = new_axes(4.4, 2.5)
        offset = np.linspace(-0.16, 0.16, len(seeds)) if len(seeds) > 1 else np.zeros(1)
        for shift, seed in zip(offset, seeds, strict=True):
            layers = np.arange(len(seed["mean"])) + shift
            color = ARM_COLORS["on"]
            axes.vlines(layers, seed["low"], seed["high"], color=color, alpha=0.35, linewidth=4)
            axes.plot(layers, seed["mean"], "o", color=color, markersize=4.5)
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(seeds[0]["mean"])))
        axes.set_ylim(0, 1)
        axes.set_xlabel("layer")
        axes.set_ylabel("gate")
        return as_svg(figure, "gates")


def sparse(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by share of second visits made: smallest gates left out beside random ones."""
    with rc_context(STYLE):
        figure, axes = new_axes(4.4, 2.5)
        for number, seed in enumerate(seeds):
            points = sorted(seed["points"], key=lambda point: point["share"])
            shares = [100 * point["share"] for point in points]
            for key, label, color, mark in (
                ("accuracy", "small gates left out", ARM_COLORS["on"], "o-"),
                ("random", "the same share at random", GREY, "s--"),
            ):
                values = [point[key] for point in points]
                name = label if number == 0 else None
                line = {"markersize": 3.5, "linewidth": 1.1, "alpha": 0.85}
                axes.plot(shares, values, mark, color=color, label=name, **line)
        axes.set_xlabel("second visits made (%)")
        axes.set_ylabel("accuracy")
        axes.legend(fontsize=8)
        return as_svg(figure, "sparse")
