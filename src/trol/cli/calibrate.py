"""`trol calibrate`: the threshold of early exits, for a wanted quality or cost, as an adapter."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.provenance import run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from trol.evaluation.calibration import Calibration
    from trol.policies.exits import EarlyExit

EXAMPLES = (
    "trol calibrate --task boards --quality 0.9 --out runs/margin",
    "trol calibrate --exit entropy --task boards --quality 0.95 --confidence 0.99 --questions 600",
    "trol calibrate --exit margin --task boards --cost 0.8 --json",
)

RESULT = "calibration.json"


def calibrate(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    measure: Annotated[
        str,
        typer.Option("--exit", metavar="MEASURE", help="entropy, margin, saturation or patience."),
    ] = "margin",
    quality: Annotated[
        float | None,
        typer.Option(
            "--quality",
            metavar="Q",
            help="Share of tokens as the full model says them. Default: 0.95, without --cost.",
        ),
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option("--cost", metavar="SHARE", help="In its place: share of the layers to run."),
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="C", help="That the quality holds.")
    ] = 0.9,
    first: Annotated[
        int | None,
        typer.Option("--first", metavar="LAYER", help="The first layer before which one leaves."),
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", metavar="K", help="Look before each K-th layer.")
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="NAME", help="Questions to calibrate on.")
    ] = "docstrings",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="How many of them.")
    ] = 300,
    seed: terminal.Seed = 0,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The adapter's folder.")] = Path(
        "runs/calibrated"
    ),
    as_json: terminal.AsJson = False,
) -> None:
    """Find the threshold at which MODEL's tokens may leave early."""
    from trol.cli.models import open_model
    from trol.evaluation import calibration
    from trol.evaluation.tasks import check_reads, task_of
    from trol.policies.adapter import check_adapter_folder
    from trol.policies.confidence import MEASURES

    if measure not in MEASURES:
        raise unknown("exit", measure, MEASURES)
    if quality is None and cost is None:
        quality = 0.95
    calibration.check_wishes(quality, cost, confidence, questions)
    asked = task_of(task)
    check_adapter_folder(out, beside=(RESULT,))
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        opened, processor = open_model(model)
        policy = _exits(opened, measure, first, every)
        items = asked.items(questions, seed, "validation")
        check_reads(processor, task, items)
        wishes = {"quality": quality, "cost": cost, "confidence": confidence}
        with _bar() as progress:
            found = calibration.calibrate(
                opened, processor, items, policy, **wishes, progress=progress
            )
        about = {"model": model, "task": task, "questions": len(items), **wishes}
        result = {**about, **found.json(), "out": str(out), "run": run_record(seed)}
        _save(opened, found.policy, out, result)
    terminal.report(result, as_json=as_json, text=lambda: _text(found, out))


def _exits(model: Any, measure: str, first: int | None, every: int | None) -> EarlyExit:
    """The exits to calibrate: those that the model carries, or new ones.

    Raises:
        UsageError: they do not fit the model, or its trained heads.
    """
    from trol.depth import attached, is_attached
    from trol.depth.families import find_decoder
    from trol.depth.host import check
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


def _save(model: Any, policy: EarlyExit, out: Path, result: dict[str, Any]) -> None:
    import trol
    from trol.analysis.files import write_json
    from trol.depth import attached, is_attached

    if policy.heads:
        attached(model)[1].depth_policy = policy  # its trained heads stay where they are
    else:
        if is_attached(model):
            trol.detach(model)
        trol.attach(model, policy)
    trol.save(model, out)
    write_json(out / RESULT, result)


def _text(found: Calibration, out: Path) -> str:
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
    return "\n".join([*lines, f"Written to {out}; trol.load(model, {str(out)!r}) attaches it."])


def _flops(share: float | None) -> str:
    if share is None:
        return ", its FLOPs are not known"
    return f", {100 * share:.3g} % of the FLOPs per answer token, looks included"


@contextmanager
def _bar() -> Generator[Callable[[int, int], None]]:
    """A bar on stderr that moves with (batches read, batches to read)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("calibrating")
        yield lambda done, of: bars.update(bar, completed=done, total=of)
