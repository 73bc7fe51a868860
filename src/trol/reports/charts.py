"""Line and bar charts as inline SVG that takes the colour of the page's text.

What paired differences over seeds allow to be said: never more than the numbers show.

Curves over the steps of a training run.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
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


NAMED = 8
"""Layers, at most, that are named in the legend one by one."""


def gates_over_time(stage: str, steps: Sequence[int], gates: Sequence[Sequence[float]]) -> str:
    """Mean gate of each layer by step, a line per layer, first layers dark. Shape: [points, L]."""
    with rc_context(STYLE):
        figure, axes = new_axes(4.4, 2.5)
        layers = list(zip(*gates, strict=True))
        shades = colormaps["viridis"].resampled(len(layers) + 1)
        named = {0, len(layers) - 1} if len(layers) > NAMED else set(range(len(layers)))
        for layer, values in enumerate(layers):
            label = f"layer {layer}" if layer in named else None
            axes.plot(steps, values, color=shades(layer), linewidth=1.1, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("mean gate")
        axes.set_ylim(0, 1)
        axes.legend(fontsize=8)
        return as_svg(figure, f"gates-{stage}")
