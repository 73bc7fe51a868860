"""The report of an oracle: its trade-off curve, its controls, and what they allow to be said.

::

    {"metric", "n", "layers", "types": {type: n},
     "menu": [{"plan", "cost", "share", "mean": {metric: mean}}],     cheapest first
     "full": mean,                                                    of the full model
     "equal_budget": {"layers", "share", "score"},    smallest mean budget as good as the full model
     "equal_shares": [low, high],        equal_budget's share in 95 % of resampled questions
     "per_sequence": {"layers", "share", "score"},    cheapest level as good for each sequence
     "best": {"layers", "share", "score"},            no limit: each sequence's best level
     "by_full": {"right", "wrong": {"n", "layers", "share", "score"} or None} or None,
                     per_sequence where the full model scores `RIGHT` or more, and where it does not
     "mix": [share of sequences on each level at equal_budget],
     "curve": [{"layers", "share", "oracle", "random", "random_spread", "held_out", "single"}],
     "controls": {"at_equal_budget": {"oracle", "random", "random_spread", "held_out", "single"},
                  "at_full_budget": {"oracle", "random", "random_spread", "held_out", "single"},
                  "reach_full": {"random", "held_out", "single": share of layers or None},
                  "best_of_n": {"n", "score", "by_n", "share_of_gain",
                                "oracle_reaches": {"layers", "share", "score"} or None} or None},
     "metrics": {metric: {"full", "equal_budget", "per_sequence", "best", "by_full", "best_of_n"}},
     "verdict": [sentence]}

Means are over sequences, long or short. Layers are those that a token of the answer visits, in the
mean over sequences; a share is of the full model's. A loss stands with its sign turned, so that
higher is better everywhere.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol.errors import UsageError
from trol.evaluation import knapsack
from trol.evaluation.answers import LOWER_IS_BETTER
from trol.evaluation.oracle import Menu
from trol.evaluation.store import OracleRow

FEW = 100
"""Sequences below which an oracle's figures say little."""

PAPERS = "23.3 % of 24 layers in arXiv 2410.20022"

POINTS = 48
"""Steps between the cheapest and the dearest level at which the curve has a point."""

ARMS = ("random", "held_out", "single")

RIGHT = 0.5
"""From this score on, of at most 1, an answer counts as right."""


class Table:
    """The scores of one metric: one row per sequence, one column per level."""

    def __init__(self, rows: Sequence[OracleRow], menu: Menu, metric: str) -> None:
        items = sorted({row.item for row in rows})
        place = {item: number for number, item in enumerate(items)}
        column = {level.text: number for number, level in enumerate(menu.levels)}
        drawn = max(row.sample for row in rows)
        self.scores: knapsack.Scores = np.full((len(items), len(menu.levels)), np.nan)
        self.drawn: knapsack.Scores = np.full((len(items), drawn), np.nan)
        self.types = [""] * len(items)
        for row in rows:
            at = place[row.item]
            if not row.sample:
                self.scores[at, column[row.plan]] = row.value(metric)
                self.types[at] = row.type
            elif metric in row.scores:
                self.drawn[at, row.sample - 1] = row.value(metric)
        self.menu, self.layers, self.n, self.metric = menu, menu.layers, len(items), metric
        self.greedy = self.scores[:, menu.full]
        self.full = float(self.greedy.mean())
        self.knapsack: knapsack.Knapsack = knapsack.solve(menu.costs, self.scores)

    def at(self, layers: float) -> float:
        """The oracle's mean score with a mean budget of so many layers."""
        return self.knapsack.value(self._total(layers)) / self.n

    def choices(self, layers: float) -> NDArray[np.int64]:
        """The level of each sequence with this mean budget."""
        return self.knapsack.choices(self._total(layers))

    def _total(self, layers: float) -> int:
        """A mean budget as a budget for all sequences."""
        return math.floor(layers * self.n + 1e-6)

    def point(self, layers: float, score: float) -> dict[str, float]:
        """A place in the plane of cost and score."""
        return {"layers": layers, "share": layers / self.layers, "score": score}

    def reaching(self, score: float) -> dict[str, float] | None:
        """The smallest mean budget with which the oracle has this mean score, if one has."""
        try:
            budget = self.knapsack.cheapest(score * self.n)
        except UsageError:
            return None
        return self.point(budget / self.n, self.knapsack.value(budget) / self.n)

    def cheapest_as_good(self) -> NDArray[np.int64]:
        """Each sequence's cheapest level that scores no less than the full model. Shape: [N]."""
        costs = np.asarray(self.menu.costs)
        good = self.scores >= self.greedy[:, None] - knapsack.SLACK
        return np.where(good, costs, costs.max() + 1).argmin(axis=1)

    def _own(self, levels: NDArray[np.int64], chosen: NDArray[np.bool_]) -> dict[str, float]:
        """The mean of some sequences, each on its own level."""
        costs, scores = np.asarray(self.menu.costs)[levels], self.scores[np.arange(self.n), levels]
        return self.point(float(costs[chosen].mean()), float(scores[chosen].mean()))

    def _by_full(self, levels: NDArray[np.int64]) -> dict[str, Any] | None:
        """Their means by whether the full model is right; None of a metric that has no right."""
        if self.metric in LOWER_IS_BETTER:
            return None
        right = self.greedy >= RIGHT
        parts = {"right": right, "wrong": ~right}
        return {
            name: {"n": int(some.sum()), **self._own(levels, some)} if some.any() else None
            for name, some in parts.items()
        }

    def summary(self) -> dict[str, Any]:
        """The oracle by both of its definitions, and without any limit."""
        cheapest = self.cheapest_as_good()
        everyone = np.ones(self.n, dtype=bool)
        has_drawn = self.drawn.size > 0 and bool(np.isfinite(self.drawn).all())
        outputs = knapsack.best_of_n(self.greedy, self.drawn) if has_drawn else None
        return {
            "full": self.full,
            "equal_budget": self.reaching(self.full),
            "per_sequence": self._own(cheapest, everyone),
            "best": self.reaching(float(self.scores.max(axis=1).mean())),
            "by_full": self._by_full(cheapest),
            "best_of_n": outputs and {"n": len(outputs), "score": outputs[-1], "by_n": outputs},
        }


def report(
    rows: Sequence[OracleRow], menu: Menu, metric: str, metrics: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """The report of finished rows, judged by `metric`; its keys are in the module's docstring.

    Args:
        rows: of all levels and samples.
        menu: the levels.
        metric: what the oracle, the curve and the controls are judged by.
        metrics: all that the rows were scored by.
        seed: of shuffles and of the split in halves.

    Raises:
        UsageError: there are fewer than two sequences.
    """
    tables = {name: Table(rows, menu, name) for name in metrics}
    table = tables[metric]
    if table.n < 2:
        raise UsageError(f"an oracle over {table.n} sequence says nothing; ask 2 or more.")
    summaries = {name: one.summary() for name, one in tables.items()}
    mine = summaries[metric]
    equal = mine["equal_budget"]["layers"]
    arms = _Arms(table, seed)
    curve = arms.curve(equal)
    mix = np.bincount(table.choices(equal), minlength=len(menu.levels)) / table.n
    result = {
        "metric": metric,
        "n": table.n,
        "layers": menu.layers,
        "types": dict(Counter(table.types)),
        "menu": [
            {
                "plan": level.text,
                "cost": level.cost,
                "share": level.cost / menu.layers,
                "mean": {name: float(one.scores[:, i].mean()) for name, one in tables.items()},
            }
            for i, level in enumerate(menu.levels)
        ],
        **{key: mine[key] for key in ("full", "equal_budget", "per_sequence", "best", "by_full")},
        "equal_shares": knapsack.equal_shares(
            menu.costs, table.scores, menu.full, menu.layers, seed
        ),
        "mix": mix.tolist(),
        "curve": curve,
        "controls": {
            "at_equal_budget": arms.at(equal),
            "at_full_budget": arms.at(table.layers),
            "reach_full": {arm: _reaches(curve, arm, table.full) for arm in ARMS},
            "best_of_n": _best_of_n(table, mine["best_of_n"]),
        },
        "metrics": summaries,
    }
    return {**result, "verdict": sentences(result)}


class _Arms:
    """The oracle and its controls at any budget."""

    def __init__(self, table: Table, seed: int) -> None:
        self.table, self.seed = table, seed
        self.held_out = knapsack.HeldOut(table.scores, table.menu.costs, table.types, seed)

    def at(self, layers: float) -> dict[str, float]:
        """Mean scores with a mean budget of so many layers."""
        table = self.table
        mean, spread = knapsack.random_allocation(table.scores, table.choices(layers), self.seed)
        return {
            "oracle": table.at(layers),
            "random": mean,
            "random_spread": spread,
            "held_out": self.held_out.score(layers),
            "single": knapsack.single_level(table.scores, table.menu.costs, layers),
        }

    def curve(self, equal: float) -> list[dict[str, float]]:
        """Points at even steps, at each level's cost, and where oracle and full are equal."""
        costs = self.table.menu.costs
        steps = np.linspace(costs[0], costs[-1], POINTS + 1).tolist()
        return [
            {"layers": layers, "share": layers / self.table.layers, **self.at(layers)}
            for layers in sorted({*steps, *map(float, costs), equal})
        ]


def _reaches(curve: Sequence[dict[str, float]], arm: str, score: float) -> float | None:
    """The first share of the curve at which an arm is as good as this score."""
    return next((point["share"] for point in curve if point[arm] >= score - knapsack.SLACK), None)


def _best_of_n(table: Table, outputs: dict[str, Any] | None) -> dict[str, Any] | None:
    """The gain of choosing among outputs at full depth, beside the oracle's gain there."""
    if outputs is None:
        return None
    gain = table.at(table.layers) - table.full
    share = (outputs["score"] - table.full) / gain if gain > knapsack.SLACK else None
    return {**outputs, "share_of_gain": share, "oracle_reaches": table.reaching(outputs["score"])}


def score_text(metric: str, value: float) -> str:
    """A score that is better when higher, for people: points of 100, or nats of loss."""
    if metric in LOWER_IS_BETTER:
        return f"{-value:.3f} nats".replace("-", "−")
    return f"{100 * value:.1f}"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """A report in words: the fraction of layers, and what it is not due to."""
    n = result["n"]
    few = f" So few questions (fewer than {FEW}) say little; ask more with --questions."
    return [
        _fraction(result),
        _choosing(result),
        _without_reference(result),
        f"One model, one set of {n} questions, one menu of {len(result['menu'])} levels: another "
        "of each gives other figures." + (few if n < FEW else ""),
        *(
            f"In oracle.json, and wherever else a {metric} stands without a unit, its sign is "
            f"turned, so that higher is better: {one['full']:.3f} is a {metric} of "
            f"{score_text(metric, one['full'])}."
            for metric, one in result["metrics"].items()
            if metric in LOWER_IS_BETTER
        ),
    ]


def _fraction(result: Mapping[str, Any]) -> str:
    equal, own, metric = result["equal_budget"], result["per_sequence"], result["metric"]
    if result["full"] <= 0 and metric not in LOWER_IS_BETTER:
        return (
            f"The full model scores nothing by {metric} on this set, so every level equals it and "
            "the figures below mean nothing; take a model that can do the task."
        )
    low, high = map(_percent, result["equal_shares"])
    return (
        f"Choosing each sequence's level with the reference at hand, {equal['layers']:.2f} of "
        f"{result['layers']} layers in the mean ({_percent(equal['share'])}) are as good as the "
        f"full model ({metric} {score_text(metric, result['full'])}); the share is {low} to {high} "
        f"(95 % of resamples of these questions), and {PAPERS}. With the cheapest level that is as "
        f"good for each sequence on its own, it is {own['layers']:.2f} layers "
        f"({_percent(own['share'])})."
    )


def _choosing(result: Mapping[str, Any]) -> str:
    metric, full, controls = result["metric"], result["full"], result["controls"]
    outputs, gain = controls["best_of_n"], controls["at_full_budget"]["oracle"] - full
    text = f"With the full model's budget the oracle gains {_gain(metric, gain)}"
    if outputs is None:
        reason = (
            "a loss belongs to the reference, not to an output, so there are no outputs to draw"
            if metric in LOWER_IS_BETTER
            else "no answers were drawn at full depth"
        )
        return f"{text}; how much of it is due to choosing alone was not measured: {reason}."
    share, reached = outputs["share_of_gain"], outputs["oracle_reaches"]
    text += (
        f" by choosing among {len(result['menu'])} levels; choosing likewise among {outputs['n']} "
        "outputs of the full model, no layer left out, gains "
        f"{_gain(metric, outputs['score'] - full)}. "
    )
    if share is None:
        return text + "So the oracle has no gain to explain."
    part = "all" if share >= 1 else _percent(max(share, 0))
    text += f"So choosing among outputs alone gives {part} of the oracle's gain. "
    if reached is None:
        return text + "No budget lets the oracle reach a full model that may choose as well."
    return text + (
        "To be as good as a full model that may choose as well, the oracle needs "
        f"{_percent(reached['share'])} of the layers."
    )


def _without_reference(result: Mapping[str, Any]) -> str:
    scores = {
        arm: score_text(result["metric"], result["controls"]["at_equal_budget"][arm])
        for arm in ARMS
    }
    reached = {
        arm: "more than any budget" if share is None else f"{_percent(share)} of the layers"
        for arm, share in result["controls"]["reach_full"].items()
    }
    return (
        f"Without the reference, {_percent(result['equal_budget']['share'])} of the layers give "
        f"{scores['random']} with the oracle's own levels dealt out at random, "
        f"{scores['held_out']} with levels by type of question chosen on the other half of the "
        f"set, {scores['single']} with the best single level. To be as good as the full model "
        f"takes {reached['held_out']} by type, {reached['single']} with a single level, and "
        f"{reached['random']} at random."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _gain(metric: str, value: float) -> str:
    if metric in LOWER_IS_BETTER:
        return f"{value:+.3f} nats".replace("-", "−")
    return f"{100 * value:+.1f} points".replace("-", "−")
