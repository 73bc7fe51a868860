"""From finished rows to what they say: the oracle, its trade-off curve, and its controls.

::

    {"metric", "n", "layers", "types": {type: n},
     "menu": [{"plan", "cost", "share", "mean": {metric: mean}}],     cheapest first
     "full": mean,                                                    of the full model
     "equal_budget": {"layers", "share", "score"},    smallest mean budget as good as the full model
     "equal_shares": [low, high],        equal_budget's share in 95 % of resampled questions
     "per_sequence": {"layers", "share", "score"},    cheapest level as good for each sequence
     "best": {"layers", "share", "score"},            no limit: each sequence's best level
     "mix": [share of sequences on each level at equal_budget],
     "curve": [{"layers", "share", "oracle", "random", "random_spread", "held_out", "single"}],
     "controls": {"at_equal_budget": {"oracle", "random", "random_spread", "held_out", "single"},
                  "at_full_budget": {"oracle", "random", "random_spread", "held_out", "single"},
                  "reach_full": {"random", "held_out", "single": share of layers or None},
                  "best_of_n": {"n", "score", "by_n", "share_of_gain",
                                "oracle_reaches": {"layers", "share", "score"} or None} or None},
     "metrics": {metric: {"full", "equal_budget", "per_sequence", "best", "best_of_n"}},
     "verdict": [sentence]}

Means are over sequences, long or short. Layers are those that a token of the answer visits, in the
mean over sequences; a share is of the full model's. A loss stands with its sign turned, so that
higher is better everywhere.

What an oracle's figures allow to be said, in sentences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol.errors import UsageError
from trol.evaluation.knapsack import (
    SLACK,
    HeldOut,
    Knapsack,
    Scores,
    best_of_n,
    equal_shares,
    random_allocation,
    single_level,
    solve,
)
from trol.evaluation.oracle_store import LOWER_IS_BETTER, Menu, OracleRow, shown

FEW = 100
"""Sequences below which an oracle's figures say little."""

PAPERS = "23.3 % of 24 layers in arXiv 2410.20022"


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What the report of `oracle.report` says: the fraction, then what it is not due to."""
    return [
        _fraction(found),
        _choosing(found),
        _without_reference(found),
        f"One model, one set of {found['n']} questions, one menu of {len(found['menu'])} levels: "
        "another of each gives other figures." + _few(found["n"]),
        *_signs(found),
    ]


def _few(count: int) -> str:
    if count >= FEW:
        return ""
    return f" So few questions (fewer than {FEW}) say little; ask more with --questions."


def _signs(found: Mapping[str, Any]) -> list[str]:
    """How to read the JSON where higher is not better."""
    return [
        f"In oracle.json, and wherever else a {metric} stands without a unit, its sign is turned, "
        f"so that higher is better: {value:.3f} is a {metric} of {shown(metric, value)}."
        for metric in LOWER_IS_BETTER & set(found["metrics"])
        for value in [found["metrics"][metric]["full"]]
    ]


def _fraction(found: Mapping[str, Any]) -> str:
    equal, own, metric = found["equal_budget"], found["per_sequence"], found["metric"]
    if found["full"] <= 0 and metric not in LOWER_IS_BETTER:
        return (
            f"The full model scores nothing by {metric} on this set, so every level equals it and "
            "the figures below mean nothing; take a model that can do the task."
        )
    return (
        f"Choosing each sequence's level with the reference at hand, {equal['layers']:.2f} of "
        f"{found['layers']} layers in the mean ({_percent(equal['share'])}) are as good as the "
        f"full model ({metric} {shown(metric, found['full'])}); the share is "
        f"{_between(found['equal_shares'])}, and {PAPERS}. With the "
        f"cheapest level that is as good for each sequence on its own, it is "
        f"{own['layers']:.2f} layers ({_percent(own['share'])})."
    )


def _choosing(found: Mapping[str, Any]) -> str:
    metric, outputs = found["metric"], found["controls"]["best_of_n"]
    oracle, full = found["controls"]["at_full_budget"]["oracle"], found["full"]
    levels = len(found["menu"])
    gained = f"With the full model's budget the oracle gains {_gain(metric, oracle - full)}"
    if outputs is None:
        reason = (
            "a loss belongs to the reference, not to an output, so there are no outputs to draw"
            if metric in LOWER_IS_BETTER
            else "no answers were drawn at full depth"
        )
        return f"{gained}; how much of it is due to choosing alone was not measured: {reason}."
    told = (
        f"{gained} by choosing among {levels} levels; choosing likewise among {outputs['n']} "
        f"outputs of the full model, no layer left out, gains "
        f"{_gain(metric, outputs['score'] - full)}. "
    )
    share, reached = outputs["share_of_gain"], outputs["oracle_reaches"]
    if share is None:
        return told + "So the oracle has no gain to explain."
    part = "all" if share >= 1 else _percent(max(share, 0))
    told += f"So choosing among outputs alone gives {part} of the oracle's gain. "
    if reached is None:
        return told + "No budget lets the oracle reach a full model that may choose as well."
    return told + (
        f"To be as good as a full model that may choose as well, the oracle needs "
        f"{_percent(reached['share'])} of the layers."
    )


def _without_reference(found: Mapping[str, Any]) -> str:
    metric, equal = found["metric"], found["controls"]["at_equal_budget"]
    reach = found["controls"]["reach_full"]
    at_random = shown(metric, equal["random"])
    return (
        f"Without the reference, {_percent(found['equal_budget']['share'])} of the layers give "
        f"{at_random} with the oracle's own levels dealt out at random, "
        f"{shown(metric, equal['held_out'])} with levels by type of question chosen on the other "
        f"half of the set, {shown(metric, equal['single'])} with the best single level. To be as "
        f"good as the full model takes {_reached(reach['held_out'])} by type, "
        f"{_reached(reach['single'])} with a single level, and {_reached(reach['random'])} at "
        "random."
    )


def _reached(share: float | None) -> str:
    return "more than any budget" if share is None else f"{_percent(share)} of the layers"


def _between(shares: Sequence[float]) -> str:
    low, high = map(_percent, shares)
    return f"{low} to {high} (95 % of resamples of these questions)"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _gain(metric: str, value: float) -> str:
    if metric in LOWER_IS_BETTER:
        return f"{value:+.3f} nats".replace("-", "−")
    return f"{100 * value:+.1f} points".replace("-", "−")


POINTS = 48
"""Steps between the cheapest and the dearest level at which the curve is told."""

ARMS = ("random", "held_out", "single")


class Table:
    """The scores of one metric: one row per sequence, one column per level."""

    def __init__(self, rows: Sequence[OracleRow], menu: Menu, metric: str) -> None:
        items = sorted({row.item for row in rows})
        place = {item: number for number, item in enumerate(items)}
        column = {level.text: number for number, level in enumerate(menu.levels)}
        drawn = max(row.sample for row in rows)
        self.scores: Scores = np.full((len(items), len(menu.levels)), np.nan)
        self.drawn: Scores = np.full((len(items), drawn), np.nan)
        self.types = [""] * len(items)
        for row in rows:
            at = place[row.item]
            if not row.sample:
                self.scores[at, column[row.plan]] = row.value(metric)
                self.types[at] = row.type
            elif metric in row.scores:
                self.drawn[at, row.sample - 1] = row.value(metric)
        self.menu, self.layers, self.n = menu, menu.layers, len(items)
        self.greedy = self.scores[:, menu.full]
        self.full = float(self.greedy.mean())
        self.knapsack: Knapsack = solve(menu.costs, self.scores)

    @property
    def has_drawn(self) -> bool:
        """Whether every sequence has answers drawn at full depth."""
        return self.drawn.size > 0 and bool(np.isfinite(self.drawn).all())

    def at(self, layers: float) -> float:
        """The oracle's mean score with a mean budget of so many layers."""
        return self.knapsack.value(self.total(layers)) / self.n

    def choices(self, layers: float) -> NDArray[np.int64]:
        """The level of each sequence with this mean budget."""
        return self.knapsack.choices(self.total(layers))

    def total(self, layers: float) -> int:
        """A mean budget as a budget for all sequences together."""
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


def summary(table: Table) -> dict[str, Any]:
    """The oracle of one metric by both of its definitions, and without any limit."""
    costs = np.asarray(table.menu.costs)
    good = table.scores >= table.greedy[:, None] - SLACK
    cheapest = np.where(good, costs, costs.max() + 1).argmin(axis=1)
    rows = np.arange(table.n)
    own = float(costs[cheapest].mean()), float(table.scores[rows, cheapest].mean())
    outputs = best_of_n(table.greedy, table.drawn) if table.has_drawn else None
    return {
        "full": table.full,
        "equal_budget": table.reaching(table.full),
        "per_sequence": table.point(*own),
        "best": table.reaching(float(table.scores.max(axis=1).mean())),
        "best_of_n": outputs and {"n": len(outputs), "score": outputs[-1], "by_n": outputs},
    }


def report(
    rows: Sequence[OracleRow],
    menu: Menu,
    metric: str,
    metrics: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """What finished rows say, judged by `metric`; see the module's text.

    Args:
        rows: of all levels and samples.
        menu: the levels.
        metric: what the controls and the curve are told of.
        metrics: all that the rows were scored by.
        seed: of shuffles and of the split in halves.

    Raises:
        UsageError: there are fewer than two sequences.
    """
    tables = {name: Table(rows, menu, name) for name in metrics}
    table = tables[metric]
    if table.n < 2:
        raise UsageError(f"an oracle over {table.n} sequence says nothing; ask 2 or more.")
    found = {name: summary(one) for name, one in tables.items()}
    mine = found[metric]
    equal = mine["equal_budget"]["layers"]
    told = _Curve(table, seed)
    curve = told.points(equal)
    mix = np.bincount(table.choices(equal), minlength=len(menu.levels)) / table.n
    result = {
        "metric": metric,
        "n": table.n,
        "layers": menu.layers,
        "types": dict(Counter(table.types)),
        "menu": _levels(menu, tables),
        **{key: mine[key] for key in ("full", "equal_budget", "per_sequence", "best")},
        "equal_shares": equal_shares(menu.costs, table.scores, menu.full, menu.layers, seed),
        "mix": mix.tolist(),
        "curve": curve,
        "controls": told.controls(equal, curve, mine),
        "metrics": found,
    }
    return {**result, "verdict": sentences(result)}


def _levels(menu: Menu, tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """What each level costs and scores in the mean, by every metric."""
    return [
        {
            "plan": level.text,
            "cost": level.cost,
            "share": level.cost / menu.layers,
            "mean": {name: float(one.scores[:, i].mean()) for name, one in tables.items()},
        }
        for i, level in enumerate(menu.levels)
    ]


class _Curve:
    """The oracle and its controls at any budget."""

    def __init__(self, table: Table, seed: int) -> None:
        self.table, self.seed = table, seed
        self.held_out = HeldOut(table.scores, table.menu.costs, table.types, seed)

    def arms(self, layers: float) -> dict[str, float]:
        """Mean scores with a mean budget of so many layers."""
        table = self.table
        mean, spread = random_allocation(table.scores, table.choices(layers), self.seed)
        return {
            "oracle": table.at(layers),
            "random": mean,
            "random_spread": spread,
            "held_out": self.held_out.score(layers),
            "single": single_level(table.scores, table.menu.costs, layers),
        }

    def controls(
        self, equal: float, curve: Sequence[dict[str, float]], mine: dict[str, Any]
    ) -> dict[str, Any]:
        """What the module's text says of them."""
        table = self.table
        return {
            "at_equal_budget": self.arms(equal),
            "at_full_budget": self.arms(table.layers),
            "reach_full": {arm: _reaches(curve, arm, table.full) for arm in ARMS},
            "best_of_n": _selection(table, mine),
        }

    def points(self, equal: float) -> list[dict[str, float]]:
        """The curve at even steps, at each level's cost, and where oracle and full are equal."""
        costs = self.table.menu.costs
        steps = np.linspace(costs[0], costs[-1], POINTS + 1).tolist()
        budgets = {*steps, *map(float, costs), equal}
        return [
            {"layers": layers, "share": layers / self.table.layers, **self.arms(layers)}
            for layers in sorted(budgets)
        ]


def _reaches(curve: Sequence[dict[str, float]], arm: str, score: float) -> float | None:
    """The first share of the curve at which an arm is as good as this score."""
    return next((point["share"] for point in curve if point[arm] >= score - SLACK), None)


def _selection(table: Table, mine: dict[str, Any]) -> dict[str, Any] | None:
    """What choosing among outputs gives at full depth, beside what the oracle gains there."""
    found = mine["best_of_n"]
    if found is None:
        return None
    gain = table.at(table.layers) - table.full
    share = (found["score"] - table.full) / gain if gain > SLACK else None
    return {**found, "share_of_gain": share, "oracle_reaches": table.reaching(found["score"])}
