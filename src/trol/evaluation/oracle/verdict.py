"""What an oracle's figures allow to be said, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trol.data.oracle_rows import LOWER_IS_BETTER, shown

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
