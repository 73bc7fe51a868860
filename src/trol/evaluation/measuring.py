"""Measuring a model on tasks: scores per question type, and what an answer costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trol.errors import DataError
from trol.evaluation.metrics import check_metric, losses, scores
from trol.evaluation.tasks import (
    Item,
    Task,
    answers,
    by_type,
    check_reads,
    check_tasks,
    cost_of,
    task_of,
)


def evaluate(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    *,
    questions: int = 1800,
    seed: int = 0,
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores per question type of each task, and what one answer costs.

    Args:
        model: a model, attached or not.
        processor: its processor; of a text decoder, its tokenizer.
        tasks: names, as `task_of` takes them.
        questions: at most so many of each task.
        seed: which of them.
        metrics: what is measured; by default all that the task has references for.

    Returns:
        `{"tasks": {name: ...}, "cost"}`; of boards `{"accuracy", "n", "by_type", "n_by_type",
        "chance_by_type"}`, of text `{"metrics": {name: mean}, "metric", "n", "by_type",
        "n_by_type", "chance_by_type"}`, where types are scored by `metric`, the first one.

    Raises:
        UsageError: a task is unknown, or has no references for a metric.
        HostError: a task shows pictures to a model that reads text alone.
    """
    check_tasks(tasks)
    for name in tasks:
        for metric in metrics:
            check_metric(name, metric)
    found: dict[str, Any] = {"tasks": {}}
    for name in tasks:
        task = task_of(name)
        items = task.items(questions, seed)
        check_reads(processor, name, items)
        found["tasks"][name] = measured(model, processor, name, items, metrics)
        found["cost"] = cost_of(model, processor, items[0], new_tokens=task.new_tokens)
    return found


def measured(
    model: Any, processor: Any, name: str, items: Sequence[Item], metrics: Sequence[str] = ()
) -> dict[str, Any]:
    """What `evaluate` says of one task."""
    task = task_of(name)
    if not items:
        raise DataError(f"the task {name} has no question; ask for one at least.")
    if "rougeL" not in task.metrics and not metrics:
        found = by_type(items, right(model, processor, items, task))
        return {**found, "chance_by_type": task.chance()}
    wanted = list(metrics) or list(task.metrics)
    given = None
    if wanted != ["loss"]:
        given = answers(model, processor, items, new_tokens=task.new_tokens)
    values = {
        metric: losses(model, processor, items)
        if metric == "loss"
        else scores(metric, given or [], items)
        for metric in wanted
    }
    found = by_type(items, values[wanted[0]])
    del found["accuracy"]
    means = {metric: sum(each) / len(each) for metric, each in values.items()}
    chance = task.chance() if wanted[0] == task.metrics[0] else {}
    return {"metrics": means, "metric": wanted[0], **found, "chance_by_type": chance}


def right(model: Any, processor: Any, items: Sequence[Item], task: Task) -> list[float]:
    """1 for each item that is answered rightly, else 0."""
    given = answers(model, processor, items, new_tokens=task.new_tokens)
    return scores("exact", given, items)
