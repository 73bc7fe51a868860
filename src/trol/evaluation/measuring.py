"""Measuring a model on tasks: scores per question type, and what an answer costs.

What a training run is watched by: questions of validation splits, which no result is made of.

What the gates do on the boards, and what happens when small ones are left out.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attached, depth, trace
from trol.errors import DataError
from trol.evaluation.metrics import check_metric, losses, scores
from trol.evaluation.tasks import (
    TASKS,
    Item,
    Task,
    answers,
    board_items,
    check_tasks,
    cost_of,
    prompts,
    questions_of,
    task_of,
)
from trol.policies.mixer import TrolMixer

Progress = Callable[[str, float, int], None]
"""(what is measured, items measured, items to measure)."""


def silent(what: str, done: float, of: int) -> None:
    """Progress that nobody is told of."""


def evaluate(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    *,
    questions: int = 1800,
    seed: int = 0,
    metrics: Sequence[str] = (),
    new_tokens: int | None = None,
    window: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Scores per question type of each task, and what one answer costs.

    Args:
        model: a model, attached or not.
        processor: its processor; of a text decoder, its tokenizer.
        tasks: names, as `task_of` takes them.
        questions: at most so many of each task; of plain text, windows.
        seed: which of them.
        metrics: what is measured; by default all that the task has references for.
        new_tokens: the longest answer; by default the task's.
        window: tokens of a window of plain text, by default as many as `questions_of` takes.
        progress: is told how far it has come.

    Returns:
        `{"tasks": {name: ...}, "cost"}`; of boards `{"accuracy", "n", "by_type", "n_by_type",
        "chance_by_type"}`, of text `{"metrics": {name: mean}, "metric", "n", "by_type",
        "n_by_type", "chance_by_type"}`, where types are scored by `metric`, the first one. Plain
        text has `perplexity`, `bits_per_byte` and `tokens` as well, and its loss is per token.

    Raises:
        UsageError: a task is unknown, or has no references for a metric.
        HostError: a task shows pictures to a model that cannot be shown any.
    """
    check_tasks(tasks)
    for name in tasks:
        for metric in metrics:
            check_metric(name, metric)
    found: dict[str, Any] = {"tasks": {}}
    for name in tasks:
        task = _task(name, new_tokens)
        items = questions_of(model, processor, name, questions, seed=seed, window=window)
        found["tasks"][name] = measured(
            model, processor, name, items, metrics, new_tokens=new_tokens, progress=progress
        )
        found["cost"] = cost_of(model, processor, items[0], new_tokens=task.new_tokens)
    return found


def _task(name: str, new_tokens: int | None) -> Task:
    task = task_of(name)
    return task if new_tokens is None else replace(task, new_tokens=new_tokens)


def measured(
    model: Any,
    processor: Any,
    name: str,
    items: Sequence[Item],
    metrics: Sequence[str] = (),
    *,
    new_tokens: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What `evaluate` says of one task."""
    task = _task(name, new_tokens)
    if not items:
        raise DataError(f"the task {name} has no question; ask for one at least.")
    if task.metrics[0] == "exact" and not metrics:
        found = by_type(items, right(model, processor, items, task, progress=progress))
        return {**found, "chance_by_type": task.chance()}
    wanted = list(metrics) or list(task.metrics)
    values = _values(model, processor, items, task, wanted=wanted, told=partial(progress, name))
    if task.windows:
        return {**_text(items, values["loss"]), "metric": "loss", "chance_by_type": {}}
    found = by_type(items, values[wanted[0]])
    del found["accuracy"]
    means = {metric: sum(each) / len(each) for metric, each in values.items()}
    chance = task.chance() if wanted[0] == task.metrics[0] else {}
    return {"metrics": means, "metric": wanted[0], **found, "chance_by_type": chance}


def _values(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    task: Task,
    *,
    wanted: Sequence[str],
    told: Callable[[float, int], None],
) -> dict[str, list[float]]:
    """Metric -> what each item is scored; answers are made if one of the metrics reads them."""
    answered = list(wanted) != ["loss"]
    of = len(items) * (answered + ("loss" in wanted))
    given: list[str] = []
    if answered:
        given = answers(
            model,
            processor,
            items,
            new_tokens=task.new_tokens,
            heard=lambda done: told(done, of),
        )
    values = {metric: scores(metric, given, items) for metric in wanted if metric != "loss"}
    if "loss" in wanted:
        before = of - len(items)
        values["loss"] = losses(model, processor, items, heard=lambda done: told(before + done, of))
    return {metric: values[metric] for metric in wanted}


def _text(items: Sequence[Item], values: Sequence[float]) -> dict[str, Any]:
    """Loss per token, perplexity and bits per byte of the predicted tokens of all windows."""
    counts = [len(item.ids) - 1 for item in items]
    nats = sum(value * count for value, count in zip(values, counts, strict=True))
    loss = nats / sum(counts)
    size = sum(len(item.answer.encode()) for item in items)
    return {
        "metrics": {
            "loss": loss,
            "perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
            "bits_per_byte": nats / math.log(2) / size,
        },
        "n": len(items),
        "tokens": sum(counts),
        "by_type": {"text": loss},
        "n_by_type": {"text": len(items)},
    }


LARGEST_EXPONENT = 700.0
"""Nats per token whose perplexity is still a number."""


def by_type(items: Sequence[Item], scores: Sequence[float]) -> dict[str, Any]:
    """Mean score in all and by type, with the number of questions."""
    found: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(items, scores, strict=True):
        found[item.type].append(float(value))
    return {
        "accuracy": sum(map(float, scores)) / len(items),
        "n": len(items),
        "by_type": {kind: sum(values) / len(values) for kind, values in found.items()},
        "n_by_type": dict(Counter(item.type for item in items)),
    }


def right(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    task: Task,
    *,
    progress: Progress = silent,
) -> list[float]:
    """1 for each item that is answered rightly, else 0."""
    given = answers(
        model,
        processor,
        items,
        new_tokens=task.new_tokens,
        heard=lambda done: progress("answers", done, len(items)),
    )
    return scores("exact", given, items)


def validate(
    model: Any, processor: Any, *, questions: int = 540, task: str = "boards"
) -> dict[str, Any]:
    """What `trol.evaluation.evaluate` says of the task, on its validation split."""
    items = questions_of(model, processor, task, questions, seed=0, split="validation")
    return measured(model, processor, task, items)


TAUS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds of a sparse curve; tokens whose gate is no larger leave after one visit."""

TRACED = 128
"""Questions whose gates are looked at."""


class Thinned(AbstractPolicy):
    """The mixer, but only a random share of tokens, layer by layer, makes the second visit."""

    name = "thinned"

    def __init__(self, mixer: TrolMixer, share: float, seed: int) -> None:
        super().__init__(scope=mixer.scope, training_scope=mixer.training_scope)
        self.mixer, self.share, self.seed = mixer, share, seed

    def bounds(self, layer: int) -> Bounds:
        return Bounds(1, self.mixer.bounds(layer).most)

    def again(self, visit: Visit) -> Answer:
        answer = self.mixer.again(visit)
        if visit.number == 0 or not isinstance(answer, Tensor):
            return answer
        source = torch.Generator().manual_seed(self.seed * 1000 + visit.layer)
        chosen = torch.rand(answer.shape, generator=source).to(answer.device) < self.share
        return torch.where(chosen, answer, 0.0)

    def settings(self) -> dict[str, Any]:
        return {"mixer": self.mixer.settings(), "share": self.share, "seed": self.seed}


def gate_spread(model: Any, processor: Any, *, seed: int = 0) -> dict[str, list[float]]:
    """Mean, 5th and 95th percentile of the gate over question tokens, layer by layer: [L] each."""
    gates = _gates(model, processor, board_items(TRACED, seed))
    return {
        "mean": gates.mean(1).tolist(),
        "low": gates.quantile(0.05, dim=1).tolist(),
        "high": gates.quantile(0.95, dim=1).tolist(),
    }


def sparse_curve(
    model: Any, processor: Any, *, questions: int = 540, seed: int = 0
) -> list[dict[str, float]]:
    """Accuracy against the share of second visits made: small gates left out, or as many random.

    Returns:
        `[{"tau", "share", "accuracy", "random"}]`; share of the second visits that tau = 0 makes.
    """
    mixer = attached(model)[1].depth_policy
    items = board_items(questions, seed)
    points: list[dict[str, float]] = []
    for tau in TAUS:
        sparse = TrolMixer(**{**mixer.settings(), "tau": tau})
        with depth(model, sparse):
            gates = _gates(model, processor, items[:TRACED])
            share = (gates > 0).float().mean().item()
            accuracy = _accuracy(model, processor, items)
        with depth(model, Thinned(mixer, share, seed)):
            at_random = _accuracy(model, processor, items)
        points.append({"tau": tau, "share": share, "accuracy": accuracy, "random": at_random})
    return points


def _accuracy(model: Any, processor: Any, items: Sequence[Item]) -> float:
    found = right(model, processor, items, TASKS["boards"])
    return sum(found) / len(found)


def _gates(model: Any, processor: Any, items: Sequence[Item]) -> Tensor:
    """What each layer gives the second visit of each question token. Shape: [L, tokens]."""
    inputs = prompts(processor, items).to(model.device)
    with trace(model) as seen, torch.inference_mode():
        model(**inputs)
    return seen.weights[:, 2][:, seen.real]
