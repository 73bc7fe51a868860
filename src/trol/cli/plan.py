"""`trol plan`: which layers a model keeps at a share of its depth, as a plan file."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.plans import check_file, write_plan
from trol.cli.provenance import run_record
from trol.errors import unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from trol.depth import Plan
    from trol.evaluation.tasks import Item

EXAMPLES = (
    "trol plan --method uniform --keep 0.5",
    "trol plan --method greedy --keep 0.5 --task boards --questions 36 --out runs/greedy.json",
    "trol plan --method influence --keep 0.75 --task boards --questions 36 --json",
)


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
        float, typer.Option("--keep", metavar="SHARE", help="Share of the layers that stay.")
    ],
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
    measured_on = {"task": task, "questions": questions, "scope": scope}
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        made, layers = _made(model, method, keep, seed, measured_on)
    about = {"model": model, "method": method, "keep": keep, **measured_on}
    found = write_plan(out, made, layers, {**about, "run": run_record(seed)})
    terminal.report(
        {**found, "file": str(out)},
        as_json=as_json,
        text=lambda: f"{made}\n{sum(found['visits'])} of {layers} layers, written to {out}",
    )


def _made(
    model: str, method: str, keep: float, seed: int, measured_on: dict[str, Any]
) -> tuple[Plan, int]:
    """The plan, and how many layers the model has; leaves in `measured_on` what was used of it."""
    from trol.cli.models import open_model
    from trol.depth.families import find_decoder, layer_list
    from trol.evaluation.chosen_plans import chosen_plan
    from trol.policies.static_plans import STATIC, static_plan

    opened, processor = open_model(model)
    layers = len(layer_list(find_decoder(opened)) or ())
    if method in STATIC:
        measured_on.clear()
        return static_plan(method, layers, keep, seed), layers
    scope, task = measured_on["scope"], measured_on["task"]
    items = _items(task, measured_on["questions"], seed, processor)
    measured_on["questions"] = len(items)
    with _bar(method) as progress:
        made = chosen_plan(method, opened, processor, items, keep, scope=scope, progress=progress)
    return made, layers


def _check(method: str, keep: float, scope: str) -> None:
    """Raises `UsageError` before a model is opened for what no model can do."""
    from trol.depth.roles import check_scope
    from trol.evaluation.chosen_plans import CHOSEN
    from trol.policies.static_plans import STATIC, kept_count

    if method not in STATIC and method not in CHOSEN:
        raise unknown("method", method, [*STATIC, *CHOSEN])
    kept_count(1, keep)
    check_scope(scope)


def _items(task: str, questions: int, seed: int, processor: Any) -> list[Item]:
    """Questions to choose by: of the validation split, so that a test sees none of them."""
    from trol.evaluation.tasks import check_reads, task_of

    items = task_of(task).items(questions, seed, "validation")
    check_reads(processor, task, items)
    return items


@contextmanager
def _bar(method: str) -> Generator[Callable[[int, int], None]]:
    """A bar on stderr that moves with (measurements made, measurements to make)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(method)
        yield lambda done, of: bars.update(bar, completed=done, total=of)
