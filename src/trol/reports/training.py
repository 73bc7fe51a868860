"""The pages `report.html` of training: of one run, and of the demo, which trains several models.

A run's page is made of its `training.json`. The results of the demo (every list of seeds in the
same order as `seeds`; accuracies are shares, 0 to 1)::

    {"model": str, "seeds": [int], "run": {"command", "commit", "versions", "seed", ...},
     "look_ups": {decoder: [{type: float, "visits": float}]},   a seed each; visits of a token
     "questions": int,                             test questions behind each accuracy
     "parameters": {arm: int}, "steps": {arm: int},
     "losses": {stage: {arm: [{"steps": [int], "losses": [float]}]}},
     "accuracy": {arm: [{type: float}]},           arms: on, off, twin; a seed each
     "chance": {type: float}, "counts": {type: int},
     "gates": [{"mean": [L], "low": [L], "high": [L]}],   over question tokens; 5th, 95th percentile
     "sparse": [{"points": [{"tau", "share", "accuracy", "random"}]}],
     "cost": {arm: {name: number | null}},         depth columns of `trol eval`
     "maps": [{"file": str, "caption": str}]}      beside results.json

`accuracy` of arm x, seed s is a mean over types unless "all" is among its keys.
"""

import base64
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context

from trol.files import write_whole
from trol.reports import pages
from trol.reports.pages import PAGE_INK, STYLE, Results, Table

RUN = Results(
    "training.json",
    "report.html",
    "trol train",
    ("losses", "seconds", "steps", "parameters", "seed"),
)
DEMO = Results(
    "results.json",
    "report.html",
    "trol demo",
    (
        "model",
        "seeds",
        "run",
        "look_ups",
        "losses",
        "accuracy",
        "chance",
        "counts",
        "gates",
        "sparse",
    ),
)

ARMS = {
    "on": ("traversal on", pages.BLUE),
    "off": ("off at test time", pages.ORANGE),
    "twin": ("twin without", pages.GREEN),
}
"""Arm of the demo -> name and colour."""

LOOK_UPS = {
    "one visit": "one layer, visited once",
    "TroL": "one layer, two visits mixed by a gate (TroL)",
    "second visit alone": "one layer, the second visit alone",
    "twice the layers": "two layers, each visited once",
}
"""Decoder of the demo -> how its page calls it."""

FEW_SEEDS = 5
"""Seeds below which a difference is no more than a lead."""


def write_run(folder: str | Path) -> Path:
    """Writes `report.html` beside the `training.json` of a run; returns the page's path.

    Where the page fails, that is a warning, and the path is that of `training.json`.

    Raises:
        DataError: there is no `training.json`, or it is no training run's.
    """
    folder = Path(folder)
    run, file = RUN.read(folder / RUN.file), folder / RUN.file
    with pages.warning_if_it_fails(file):
        return write_whole(folder / RUN.page, render_run(run, folder.name))
    return file


def render_run(run: Mapping[str, Any], name: str) -> str:
    """The page of one run."""
    validation, curves = run.get("validation"), run["losses"]
    values = {
        "losses": {stage: loss_chart(stage, {"run": [curve]}) for stage, curve in curves.items()},
        "gates": {
            stage: gates_over_time(stage, curve["steps"], curve["gates"])
            for stage, curve in curves.items()
            if curve.get("gates")
        },
        "validation": validation,
    }
    if validation:
        scores, chance = validation["by_type"], validation["chance_by_type"]
        values["accuracies"] = accuracy_chart(list(scores), {"this model": [scores]}, chance)
    run_record = run.get("run", {})
    return pages.render("training.html", name=name, results=run, run=run_record, **values)


def write_demo(results: Mapping[str, Any], out: str | Path) -> Path:
    """Writes `results.json`, then `report.html` into the folder `out`; see `Results.write`."""
    return DEMO.write(results, out, lambda place: render_demo(results, place))


def render_demo(results: Mapping[str, Any], place: Path) -> str:
    """The page of the demo, its map pictures read from `place`."""
    types, accuracy, cost = list(results["chance"]), results["accuracy"], results.get("cost", {})
    maps = [
        {**item, "data": base64.b64encode((place / item["file"]).read_bytes()).decode()}
        for item in results.get("maps", ())
    ]
    return pages.render(
        "demo.html",
        results={**results, "cost": cost},
        run=results["run"],
        names={arm: arm_name(arm) for arm in {**accuracy, **cost}},
        totals={arm: [total(seed) for seed in seeds] for arm, seeds in accuracy.items()},
        look_ups=look_ups_table(results),
        differences=differences_table(results),
        accuracies=accuracy_chart(types, accuracy, results["chance"]),
        losses={stage: loss_chart(stage, arms) for stage, arms in results["losses"].items()},
        gates=gates_of_layers(results["gates"]),
        sparse=sparse_chart(results["sparse"]),
        measures=list(dict.fromkeys(name for arm in cost.values() for name in arm)),
        readable=readable,
        maps=maps,
    )


def total(accuracy: Mapping[str, float]) -> float:
    """The accuracy of one seed over all types: as measured, else the mean over types."""
    return accuracy["all"] if "all" in accuracy else statistics.fmean(accuracy.values())


def look_ups_table(results: Mapping[str, Any]) -> Table:
    """What decoders of one layer, or two, answer to questions of one look-up and of several."""
    learnt = results["look_ups"]
    kinds = [kind for kind in next(iter(learnt.values()))[0] if kind != "visits"]
    rows = [
        [
            LOOK_UPS[name],
            *(pages.points([seed[kind] for seed in seeds]) for kind in kinds),
            f"{statistics.fmean(seed['visits'] for seed in seeds):.2f}",
        ]
        for name, seeds in learnt.items()
    ]
    notes = ["Right letters in percent. Before the second look-up is learnt it has about 25."]
    return Table(["a decoder that learns look-ups", *kinds, "layer visits a token"], rows, notes)


def differences_table(results: Mapping[str, Any]) -> Table:
    """Accuracies compared seed by seed: what traversal did, and leaving out second visits."""
    points = [seed["points"] for seed in results["sparse"]]
    half = [min(some, key=lambda point: abs(point["share"] - 0.5)) for some in points]
    full = [max(some, key=lambda point: point["share"]) for some in points]
    share = f"{statistics.fmean(point['share'] for point in half):.0%} of second visits"
    scores = {arm: [total(seed) for seed in seeds] for arm, seeds in results["accuracy"].items()}
    scores |= {"small": [point["accuracy"] for point in half]}
    scores |= {"random": [point["random"] for point in half]}
    scores |= {"all": [point["accuracy"] for point in full]}
    rows = []
    for name, one, other in (
        ("traversal on − the twin trained without", "on", "twin"),
        ("traversal on − traversal off at test time", "on", "off"),
        (f"{share}, small gates left out − all", "small", "all"),
        (f"{share}, left out at random − all", "random", "all"),
        ("leaving out small gates − leaving out at random", "small", "random"),
    ):
        if other in scores:
            compared = pages.compare(scores[one], scores[other])
            ahead = sum(difference > 0 for difference in compared.differences)
            rows.append([name, compared.text(100, 1), f"{ahead} of {len(compared.differences)}"])
    notes = ["Points of accuracy with 95 % intervals: one that holds zero shows no difference."]
    if len(points) == 1:
        notes = ["Points of accuracy. One seed gives no interval: another seed may turn the sign."]
    elif len(points) < FEW_SEEDS:
        notes.append(f"{len(points)} seeds are few: take a difference as a lead.")
    return Table(["difference", "points", "seeds ahead"], rows, notes)


def arm_name(arm: str) -> str:
    """An arm of the demo as charts and tables call it."""
    return ARMS[arm][0] if arm in ARMS else arm


def readable(value: float | None) -> str:
    """A number with a unit prefix (k, M, G), three digits."""
    if value is None:
        return "–"
    for scale, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"


SMALL = (4.4, 2.5)
"""Size of charts that stand side by side. Unit: inches."""


def _color(arm: str) -> str:
    return ARMS[arm][1] if arm in ARMS else pages.GREY


@rc_context(STYLE)
def loss_chart(stage: str, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Training loss of one stage: a thin line per seed, colour by arm. Nats per token by step."""
    figure, (axes,) = pages.new_axes(SMALL, "step", "loss (nats per token)")
    for arm, runs in arms.items():
        for number, run in enumerate(runs):
            label = arm_name(arm) if number == 0 and len(arms) > 1 else None
            style = {"color": _color(arm), "linewidth": 1.1, "alpha": 0.8}
            axes.plot(run["steps"], run["losses"], label=label, **style)
    axes.set_ylim(bottom=0)
    if len(arms) > 1:
        axes.legend(fontsize=8)
    return pages.as_svg(figure, f"loss-{stage}")


@rc_context(STYLE)
def accuracy_chart(
    types: Sequence[str],
    arms: Mapping[str, Sequence[Mapping[str, float]]],
    chance: Mapping[str, float],
) -> str:
    """Accuracy per question type: bars are means over seeds, dots the seeds, dashes chance.

    `chance` lacks the types whose chance is not known.
    """
    figure, (axes,) = pages.new_axes((max(6.5, 1.0 * len(types)), 3.1), "", "accuracy")
    places = np.arange(len(types))
    width = 0.8 / len(arms)
    for index, (arm, seeds) in enumerate(arms.items()):
        at = places - 0.4 + width * (index + 0.5)
        means = [statistics.fmean(seed[kind] for seed in seeds) for kind in types]
        axes.bar(at, means, width * 0.92, color=_color(arm), alpha=0.72, label=arm_name(arm))
        if len(seeds) > 1:
            for seed in seeds:
                axes.plot(at, [seed[kind] for kind in types], ".", color=PAGE_INK, markersize=3)
    label = "chance"
    for place, name in zip(places, types, strict=True):
        if name in chance:
            line = {"color": PAGE_INK, "linewidth": 1.1, "linestyles": "dashed"}
            axes.hlines(chance[name], place - 0.44, place + 0.44, label=label, **line)
            label = None
    axes.set_xticks(places, [name.replace("_", " ") for name in types])
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return pages.as_svg(figure, "accuracy")


@rc_context(STYLE)
def gates_of_layers(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Gate per layer: a dot per seed (mean over tokens) on a bar, 5th to 95th percentile."""
    figure, (axes,) = pages.new_axes(SMALL, "layer", "gate")
    offset = np.linspace(-0.16, 0.16, len(seeds)) if len(seeds) > 1 else np.zeros(1)
    for shift, seed in zip(offset, seeds, strict=True):
        layers = np.arange(len(seed["mean"])) + shift
        axes.vlines(layers, seed["low"], seed["high"], color=pages.BLUE, alpha=0.35, linewidth=4)
        axes.plot(layers, seed["mean"], "o", color=pages.BLUE, markersize=4.5)
    axes.axhline(0.5, color=pages.GREY, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(seeds[0]["mean"])))
    axes.set_ylim(0, 1)
    return pages.as_svg(figure, "gates")


@rc_context(STYLE)
def sparse_chart(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by share of second visits made: smallest gates left out beside random ones."""
    figure, (axes,) = pages.new_axes(SMALL, "second visits made (%)", "accuracy")
    for number, seed in enumerate(seeds):
        points = sorted(seed["points"], key=lambda point: point["share"])
        shares = [100 * point["share"] for point in points]
        for key, label, color, mark in (
            ("accuracy", "small gates left out", pages.BLUE, "o-"),
            ("random", "the same share at random", pages.GREY, "s--"),
        ):
            line = {"markersize": 3.5, "linewidth": 1.1, "alpha": 0.85, "color": color}
            name = label if number == 0 else None
            axes.plot(shares, [point[key] for point in points], mark, label=name, **line)
    axes.legend(fontsize=8)
    return pages.as_svg(figure, "sparse")


LAYERS_IN_LEGEND = 8
"""Of more layers, the legend names the first and the last alone."""


@rc_context(STYLE)
def gates_over_time(stage: str, steps: Sequence[int], gates: Sequence[Sequence[float]]) -> str:
    """Mean gate of each layer by step, a line per layer, first layers dark. Shape: [points, L]."""
    figure, (axes,) = pages.new_axes(SMALL, "step", "mean gate")
    layers = list(zip(*gates, strict=True))
    shades = colormaps["viridis"].resampled(len(layers) + 1)
    for layer, values in enumerate(layers):
        named = len(layers) <= LAYERS_IN_LEGEND or layer in (0, len(layers) - 1)
        label = f"layer {layer}" if named else None
        axes.plot(steps, values, color=shades(layer), linewidth=1.1, label=label)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    return pages.as_svg(figure, f"gates-{stage}")
