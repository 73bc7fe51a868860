"""`trol calibrate`: thresholds that save most while the answers stay as they were, as an adapter.

Of a model that traverses: those of its gates, and layers that need no second visit. With `--exit`:
that of early exits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.terminal import run_record
from trol.errors import UsageError

EXAMPLES = (
    "trol calibrate --data boards --quality 0.99 --out runs/sparse",
    "trol calibrate --exit margin --data boards --quality 0.9 --out runs/margin",
    "trol calibrate --exit entropy --data boards --cost 0.8 --json",
)

RESULT = "calibration.json"


def calibrate(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--task",
            metavar="NAME",
            help="Questions to calibrate on: boards, docstrings, text:FILE, chat:FILE, "
            "alpaca:FILE, ... Default: boards for a model that sees, docstrings for one that "
            "reads.",
        ),
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            "--quality",
            metavar="Q",
            help="Share of answers as under full traversal (default: 0.99); with --exit, share of "
            "tokens as the full model says them (0.95).",
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="C", help="That the quality holds.")
    ] = 0.9,
    measure: Annotated[
        str | None,
        typer.Option(
            "--exit",
            metavar="MEASURE",
            help="Calibrate early exits: entropy, margin, saturation or patience.",
        ),
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option("--cost", metavar="SHARE", help="Exits: share of the layers to run instead."),
    ] = None,
    first: Annotated[
        int | None,
        typer.Option("--first", metavar="LAYER", help="Exits: the first layer looked before."),
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", metavar="K", help="Exits: look before each K-th layer.")
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            metavar="N",
            min=1,
            help="How many. Default: four times what the quality needs; with --exit, 300.",
        ),
    ] = None,
    seed: terminal.Seed = 0,
    chat_template: terminal.ChatTemplate = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The adapter's folder.")] = Path(
        "runs/calibrated"
    ),
    as_json: terminal.AsJson = False,
) -> None:
    """Find which second visits MODEL can spare, or early exits."""
    from trol.checkpoints.adapter import check_adapter_folder
    from trol.cli import calibrated_exits, calibrated_taus
    from trol.cli.models import open_model
    from trol.data.conversations import read_template
    from trol.depth import is_attached
    from trol.evaluation.calibration import check_share
    from trol.evaluation.tasks import default_task, task_of

    wanted = {"quality": quality, "cost": cost, "confidence": confidence, "questions": questions}
    wanted |= {"measure": measure, "first": first, "every": every, "seed": seed}
    for name in ("quality", "confidence"):
        if wanted[name] is not None:
            check_share(name, wanted[name])
    if measure is not None:
        calibrated_exits.check(measure, wanted)
    else:
        _check_either(wanted)
    if data is not None:
        task_of(data)
    template = None if chat_template is None else read_template(chat_template)
    check_adapter_folder(out, beside=(RESULT,))
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        opened, processor = open_model(model, chat_template=template)
        carries = is_attached(opened)
        wanted["measure"] = _measure(opened, wanted)
        kind = calibrated_taus if wanted["measure"] is None else calibrated_exits
        data = data or default_task(processor)
        with terminal.progress("calibrating", "batch") as progress:
            found, asked, text = kind.calibrated(opened, processor, data, wanted, progress)
        result = {"model": model, "data": data, **asked, **found.json(), "out": str(out)}
        result["run"] = run_record(seed)
        _save(opened, found.policy, out, result)
    onto = "trol.detach(model)" if carries else "model"
    last = f"Written to {out}; trol.load({onto}, {str(out)!r}) attaches it."
    terminal.report(result, as_json=as_json, text=lambda: f"{text}\n{last}")


def _check_either(wanted: dict[str, Any]) -> None:
    """Raises `UsageError` for what is possible of no model, be it with gates or with exits."""
    from trol.cli import calibrated_exits, calibrated_taus
    from trol.policies.exits import EarlyExit

    try:
        calibrated_exits.check(EarlyExit().measure, wanted)
    except UsageError:
        calibrated_taus.check(wanted)


def _measure(model: Any, wanted: dict[str, Any]) -> str | None:
    """The measure of the exits to calibrate, or None where it is the gates of the model.

    Raises:
        UsageError: there are no gates and no measure is named, or there are and exits are meant.
    """
    from trol.cli.calibrated_taus import check
    from trol.depth import attached, is_attached
    from trol.evaluation.calibration import mixer_of
    from trol.policies.exits import EarlyExit

    if wanted["measure"] is not None:
        return wanted["measure"]
    carried = attached(model)[1].depth_policy if is_attached(model) else None
    if isinstance(carried, EarlyExit):
        return carried.measure
    mixer_of(model)
    check(wanted)
    return None


def _save(model: Any, policy: Any, out: Path, result: dict[str, Any]) -> None:
    import trol
    from trol.depth import attached, is_attached
    from trol.files import write_json
    from trol.policies.mixer import TrolMixer

    if isinstance(policy, TrolMixer) or policy.heads:
        attached(model)[1].depth_policy = policy  # its trained parameters stay where they are
    else:
        if is_attached(model):
            trol.detach(model)
        trol.attach(model, policy)
    trol.save(model, out)
    write_json(out / RESULT, result)
