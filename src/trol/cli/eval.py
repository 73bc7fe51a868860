"""`trol eval`: scores per question type, beside chance."""

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
        str,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Of boards, docstrings, alpaca:FILE, cnn_dailymail:FILE, samsum:FILE.",
        ),
    ] = "boards",
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            metavar="NAMES",
            help="Of rouge1, rouge2, rougeL, exact, loss; default: all that the task allows.",
        ),
    ] = "",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="Questions per task.")
    ] = 2000,
    depth: terminal.Depth = None,
    seed: terminal.Seed = 0,
    as_json: terminal.AsJson = False,
) -> None:
    """Measure MODEL on pictures and texts that it never saw."""
    from trol import evaluation
    from trol.evaluation.metrics import check_metric

    names, wanted = _listed(tasks), _listed(metrics)
    evaluation.check_tasks(names)
    for metric in wanted:
        for name in names:
            check_metric(name, metric)
    conversation = start(model, max_new_tokens=1, plan=depth)
    with terminal.noise_to_stderr(), conversation.depth():
        found = evaluation.evaluate(
            conversation.model,
            conversation.processor,
            names,
            questions=questions,
            seed=seed,
            metrics=wanted,
        )
    result = {"model": model, "depth": conversation.plan, **found, "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _table(result))


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _table(result: dict[str, Any]) -> str:
    """Score and chance per question type of every task, then its other metrics."""
    parts: list[str] = []
    for name, task in result["tasks"].items():
        metric = task.get("metric", "accuracy")
        percent = metric != "loss"
        rows = [[name, f"{metric} %" if percent else metric, "chance %"]]
        for kind, value in task["by_type"].items():
            chance = task["chance_by_type"].get(kind)
            rows.append([kind, _number(value, percent), _number(chance, percent)])
        whole = task["metrics"][metric] if "metrics" in task else task["accuracy"]
        rows.append([f"all ({task['n']})", _number(whole, percent), ""])
        others = {key: value for key, value in task.get("metrics", {}).items() if key != metric}
        rows += [[key, _number(value, key != "loss"), ""] for key, value in others.items()]
        parts.append(terminal.table(rows))
    return "\n\n".join(parts)


def _number(value: float | None, percent: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"
