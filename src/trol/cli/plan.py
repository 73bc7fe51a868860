"""`trol plan`: which layers a model keeps at a share of its depth, as a plan file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trol.cli import terminal
from trol.cli.plans import check_file, write_plan
from trol.cli.provenance import run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.depth import Plan
    from trol.evaluation.tasks import Item

EXAMPLES = (
    "trol plan --method uniform --keep 0.5",
    "trol plan --method greedy --keep 0.5 --task boards --questions 36 --out runs/greedy.json",
    "trol plan --method influence --keep 0.75 --task boards --questions 36 --json",
)

TIMED = 8
"""Questions that a draft is timed on."""


def plan(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="uniform, random, exit, middle; by measure: influence, greedy, draft.",
        ),
    ] = "uniform",
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep", metavar="SHARE", help="Share of the layers that stay; draft needs none."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="NAME", help="Questions to measure on.")
    ] = "docstrings",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="How many of them.")
    ] = 64,
    scope: Annotated[
        str,
        typer.Option("--scope", metavar="ROLES", help="Who skips: answer, question, all."),
    ] = "answer",
    seed: terminal.Seed = 0,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The plan file.")] = Path(
        "runs/plan.json"
    ),
    as_json: terminal.AsJson = False,
) -> None:
    """Choose the layers that MODEL keeps at a share of its depth."""
    check_file(out)
    _check(method, keep, scope)
    measured_on: dict[str, Any] = {"task": task, "questions": questions, "scope": scope}
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        made, layers = _made(model, method, keep, seed, measured_on)
    about = {"model": model, "method": method, "keep": keep, **measured_on}
    found = write_plan(out, made, layers, {**about, "run": run_record(seed)})
    terminal.report(
        {**found, "file": str(out)},
        as_json=as_json,
        text=lambda: _told(found, layers, out),
    )


def _made(
    model: str, method: str, keep: float | None, seed: int, measured_on: dict[str, Any]
) -> tuple[Plan, int]:
    """The plan, and how many layers the model has; leaves in `measured_on` what was used of it."""
    from trol.cli.models import open_model
    from trol.evaluation.chosen_plans import chosen_plan
    from trol.evaluation.draft_plans import draft_plan, measured_speed
    from trol.host.layers import find_decoder, layer_list
    from trol.policies.static_plans import STATIC, static_plan

    opened, processor = open_model(model)
    layers = len(layer_list(find_decoder(opened)) or ())
    if method in STATIC:
        measured_on.clear()
        return static_plan(method, layers, cast(float, keep), seed), layers
    scope, task = measured_on["scope"], measured_on["task"]
    items = _items(task, measured_on["questions"], seed, processor)
    measured_on["questions"] = len(items)
    with terminal.progress(method) as progress:
        if method == "draft":
            chosen = draft_plan(opened, processor, items, keep, progress=progress)
            speed = measured_speed(opened, processor, items[:TIMED], chosen.plan, chosen.tokens)
            measured_on["draft"] = {**asdict(chosen), "plan": str(chosen.plan), "measured": speed}
            return chosen.plan, layers
        share = cast(float, keep)
        made = chosen_plan(method, opened, processor, items, share, scope=scope, progress=progress)
    return made, layers


def _told(found: dict[str, Any], layers: int, out: Path) -> str:
    lines = [found["plan"], f"{sum(found['visits'])} of {layers} layers, written to {out}"]
    if draft := found.get("draft"):
        speed = draft["measured"]
        lines.append(
            f"drafting {draft['tokens']} tokens a round, it says {draft['agreement']:.0%} of the "
            f"model's own tokens: {speed['ratio']:.2f} ± {speed['spread']:.2f} times as fast as "
            f"without, one question at a time (predicted {draft['predicted_speedup']:.2f})"
        )
        if speed["ratio"] <= 1:
            lines.append("No draft of this model saves time here; decode without.")
    return "\n".join(lines)


def _check(method: str, keep: float | None, scope: str) -> None:
    """Raises `UsageError` before a model is opened for what no model can do."""
    from trol.depth.roles import check_scope
    from trol.evaluation.chosen_plans import CHOSEN
    from trol.policies.static_plans import STATIC, kept_count

    if method not in STATIC and method not in CHOSEN:
        raise unknown("method", method, [*STATIC, *CHOSEN])
    if keep is not None:
        kept_count(1, keep)
    elif method != "draft":
        raise UsageError(
            f"no share of layers given; add one, such as --method {method} --keep 0.5."
        )
    check_scope(scope)


def _items(task: str, questions: int, seed: int, processor: Any) -> list[Item]:
    """Questions to choose by: of the validation split, so that a test sees none of them."""
    from trol.evaluation.tasks import check_reads, task_of

    items = task_of(task).items(questions, seed, "validation")
    check_reads(processor, task, items)
    return items
