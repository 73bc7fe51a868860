"""Thresholds of gates for `trol calibrate`, and what people are told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trol.cli import terminal
from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.evaluation.answers import StepsDone
    from trol.evaluation.gates import GateCalibration

QUALITY = 0.99
"""What is wanted where nobody says."""


def check(wanted: dict[str, Any]) -> None:
    """Raises `UsageError` for what is wrong whatever the gates are."""
    from trol.evaluation.calibration import check_gate_wishes

    given = [name for name in ("cost", "first", "every") if wanted[name] is not None]
    if given:
        raise UsageError(
            f"--{given[0]} is for early exits; add --exit MEASURE, or leave --{given[0]} out to "
            "calibrate the gates of this model."
        )
    check_gate_wishes(**_wishes(wanted), questions=wanted["questions"])


def _wishes(wanted: dict[str, Any]) -> dict[str, Any]:
    return {"quality": wanted["quality"] or QUALITY, "confidence": wanted["confidence"]}


def calibrated(
    model: Any, processor: Any, data: str, wanted: dict[str, Any], progress: StepsDone
) -> tuple[GateCalibration, dict[str, Any], str]:
    """The calibrated thresholds, what was asked for, and what people are told."""
    from trol.evaluation.calibration import calibrate_gates, questions_for
    from trol.evaluation.tasks import questions_of, task_of

    wishes = _wishes(wanted)
    count = wanted["questions"] or questions_for(**wishes)
    task = task_of(data)
    items = questions_of(model, processor, data, count, seed=wanted["seed"], split="validation")
    found = calibrate_gates(
        model, processor, items, new_tokens=task.new_tokens, **wishes, progress=progress
    )
    return found, {"questions": len(items), **wishes}, _text(found)


def _text(found: GateCalibration) -> str:
    unit = "FLOPs" if found.flops else "layer visits"
    lines = [
        terminal.table(
            [
                ["layer", "tau", "second visits made"],
                *(
                    [str(layer), _tau(found.policy.threshold(layer)), f"{100 * share:.1f} %"]
                    for layer, share in enumerate(found.shares)
                ),
            ]
        ),
        f"{100 * found.kept.share:.2f} % of {found.kept.questions} answers are those of full "
        "traversal, on questions that nothing was searched on (lower confidence limit "
        f"{100 * found.at_least:.2f} %, p = {found.p_value:.3g} that less than the wanted quality "
        "is kept).",
        f"A prompt takes {found.cost[1]:.2f} times the plain model's {unit}; full traversal "
        f"{found.cost[0]:.2f} (predicted).",
    ]
    for read in found.prefill:
        together = "one question" if read.questions == 1 else f"{read.questions} questions at once"
        saved = 1 - read.ratio["sparse"] / read.ratio["full"]
        lines.append(
            f"Reading {together}, up to {read.tokens} tokens: {read.ratio['sparse']:.2f} times the "
            f"plain model's time, full traversal {read.ratio['full']:.2f} (spread "
            f"{max(read.spread.values()):.2f}): {100 * saved:.0f} % saved."
        )
    if not any(found.policy.threshold(layer) != 0 for layer in range(len(found.shares))):
        lines.append("No second visit can be left out; lower --quality, or give more --questions.")
    return "\n".join(lines)


def _tau(tau: float | None) -> str:
    return "none: one visit" if tau is None else f"{tau:g}"
