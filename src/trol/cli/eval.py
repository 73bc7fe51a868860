"""`trol eval`: accuracy per question type, beside chance."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.conversation import start
from trol.cli.provenance import run_record

EXAMPLES = (
    "trol eval --tasks boards",
    "trol eval trol-tiny --tasks boards --depth all --questions 300",
    "trol eval --tasks boards --seed 7 --json",
)


def evaluate(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAMES", help="Names, with commas between.")
    ] = "boards",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="Questions per task.")
    ] = 2000,
    depth: terminal.Depth = None,
    seed: terminal.Seed = 0,
    as_json: terminal.AsJson = False,
) -> None:
    """Measure MODEL on questions about pictures that it never saw."""
    from trol import evaluation

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    evaluation.check_tasks(names)
    conversation = start(model, max_new_tokens=1, plan=depth)
    with terminal.noise_to_stderr(), conversation.depth():
        found = evaluation.evaluate(
            conversation.model, conversation.processor, names, questions=questions, seed=seed
        )
    result = {"model": model, "depth": depth, **found, "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _table(result))


def _table(result: dict[str, Any]) -> str:
    """Accuracy and chance per question type of every task."""
    parts: list[str] = []
    for name, task in result["tasks"].items():
        rows = [[name, "accuracy %", "chance %"]]
        for kind, accuracy in task["by_type"].items():
            chance = task["chance_by_type"][kind]
            rows.append([kind, f"{100 * accuracy:.1f}", f"{100 * chance:.1f}"])
        rows.append([f"all ({task['n']})", f"{100 * task['accuracy']:.1f}", ""])
        parts.append(terminal.table(rows))
    return "\n\n".join(parts)
