"""Early exits for `trol calibrate`: which are calibrated, and what people are told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trol.cli import terminal
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.evaluation.answers import StepsDone
    from trol.evaluation.calibration import ExitCalibration
    from trol.policies.exits import EarlyExit

QUALITY, QUESTIONS = 0.95, 300
"""What is wanted, and how many are asked, where nobody says."""


def check(measure: str, wanted: dict[str, Any]) -> None:
    """Raises `UsageError` for what is wrong whatever the model is."""
    from trol.evaluation.calibration import check_exit_wishes
    from trol.policies.exits import MEASURES

    if measure not in MEASURES:
        raise unknown("exit", measure, MEASURES)
    check_exit_wishes(**_wishes(wanted), answers=wanted["questions"] or QUESTIONS)


def _wishes(wanted: dict[str, Any]) -> dict[str, Any]:
    wishes = {key: wanted[key] for key in ("quality", "cost", "confidence")}
    if wishes["quality"] is None and wishes["cost"] is None:
        wishes["quality"] = QUALITY
    return wishes


def calibrated(
    model: Any, processor: Any, data: str, wanted: dict[str, Any], progress: StepsDone
) -> tuple[ExitCalibration, dict[str, Any], str]:
    """The calibrated exits, what was asked for, and what people are told."""
    from trol.evaluation.calibration import calibrate_exits
    from trol.evaluation.tasks import questions_of

    wishes = _wishes(wanted)
    policy = _exits(model, wanted["measure"], wanted["first"], wanted["every"])
    count = wanted["questions"] or QUESTIONS
    items = questions_of(model, processor, data, count, seed=wanted["seed"], split="validation")
    found = calibrate_exits(model, processor, items, policy, **wishes, progress=progress)
    return found, {"questions": len(items), **wishes}, _text(found)


def _exits(model: Any, measure: str, first: int | None, every: int | None) -> EarlyExit:
    """The exits to calibrate: those that the model carries, or new ones.

    Raises:
        UsageError: they do not fit the model, or its trained heads.
    """
    from trol.depth import attached, is_attached
    from trol.depth.attachment import check
    from trol.host.layers import find_decoder
    from trol.policies.exits import EarlyExit

    settings: dict[str, Any] = {"first": 1, "every": 1}
    if is_attached(model):
        carried = attached(model)[1].depth_policy
        if isinstance(carried, EarlyExit):
            settings = {key: carried.settings()[key] for key in ("first", "every", "heads")}
        elif carried.name != "plain":
            terminal.note(
                f"trol: {carried.name} is taken off: exits are calibrated on the plain model."
            )
    given = {"first": first, "every": every}
    if settings.get("heads") and any(
        value not in (None, settings[key]) for key, value in given.items()
    ):
        raise UsageError(
            f"the model's exit heads were trained for first={settings['first']} and "
            f"every={settings['every']}; leave --first and --every out."
        )
    settings |= {key: value for key, value in given.items() if value is not None}
    policy = EarlyExit(measure, 1.0, **settings)  # type: ignore[arg-type]
    check(find_decoder(model), policy)
    return policy


def _text(found: ExitCalibration) -> str:
    policy, ran = found.policy, found.ran
    lines = [
        f"{policy.measure} >= {policy.thresholds[0]:g}, looked at before every layer from "
        f"{policy.first}" + (f", each {policy.every}." if policy.every > 1 else "."),
        f"{100 * ran.executed:.1f} % of the layers run{_flops(found.flops_share)}; "
        f"{100 * ran.quality:.1f} % of the tokens agree with the full model "
        f"({len(ran.qualities)} answers, {found.tokens} tokens).",
    ]
    if found.flops_share is not None and found.flops_share >= 1:
        lines.append(
            "These exits save nothing on this model: its looks, which read the head, cost as much "
            "as the skipped layers or more. Look less often (--every K) or later (--first LAYER)."
        )
    if found.p_value is not None:
        lines.append(f"p = {found.p_value:.3g} that less than the wanted quality is kept.")
    if ran.executed == 1:
        lines.append("No token leaves early; lower --quality, or train exit heads.")
    return "\n".join(lines)


def _flops(share: float | None) -> str:
    if share is None:
        return ", its FLOPs are not known"
    return f", {100 * share:.3g} % of the FLOPs per answer token, looks included"
