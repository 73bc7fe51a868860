"""Curves as one JSON object: every method's points on every task, mean and spread over seeds.

Every *stat* is `{"mean", "spread", "values"}`: over seeds, the spread a sample standard
deviation or null, the values seed by seed; null where it is not known::

    {"scope", "layers", "questions", "seeds": [int], "keep": [float], "device",
     "timing": {"batch", "tokens", "rounds"},
     "tasks": {task: {
        "n": int, "metrics": {name: {"better": "higher" | "lower"}},   the first judges
        "methods": {method: {
            "bound": bool,            drawn by looking at the references
            "made_on": {"n", "split", "metric", "seed", "full", "full_here"},    of an oracle alone
            "points": [{
                "keep": float | null,               as asked; null: decided while running
                "settings": {...},                  plan, plans of the seeds, or adapter
                "metrics": {name: stat},
                "visits": stat, "visits_share": stat,          per answer token
                "flops": stat, "flops_share": stat,            per answer token
                "prefill_flops": stat, "prefill_flops_share": stat,      per question
                "ms": stat, "ms_ratio": stat,                  per answer token
                "prefill_ms": stat, "prefill_ms_ratio": stat,            per question
                "cosines": [L] | null}]}}}}}        to the full model's x_1 to x_L

Points lie in rising order of `visits_share`; the last one is the full model, but for an
oracle, whose last point chooses among levels with the full model's budget.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trol.depth.registry import to_settings
from trol.errors import DataError
from trol.evaluation.curves.methods import (
    ORACLE,
    Candidate,
    Request,
    candidates,
    check_adapters,
    check_methods,
    layers_of,
)
from trol.evaluation.curves.oracle import check_oracle, made_on, oracle_points, read_oracle
from trol.evaluation.curves.points import FORCED_TOKENS, ROUNDS, Point, Sample, measure
from trol.evaluation.tasks import Task, check_tasks, questions_of, task_of
from trol.policies.plain import Plain

LOWER_IS_BETTER = ("loss",)

FULL = {"plan": "all"}
"""Settings of the full model's point, which every curve has."""

Progress = Callable[[str, int, int], None]
"""(what is being measured, points measured, points to measure)."""

Measured = dict[tuple[int, str, int], Point]
"""(which model, its policy as JSON, seed) -> its point."""


def curve(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    request: Request,
    *,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Quality against cost, of every method on every task.

    Args:
        model: the model, plain or attached; what it carries stays attached.
        processor: its processor; of a text decoder, its tokenizer.
        tasks: names, as `task_of` takes them.
        request: methods, shares, seeds and what they need.
        progress: called before each point.

    Returns:
        What this module's text says.

    Raises:
        UsageError: a task, method or share is unknown, a method lacks what it needs, or the
            oracle is of another task, scope or stack.
        HostError: a task shows pictures to a model that reads text alone.
        DataError: a task has no questions, or the oracle's folder is damaged.
    """
    check_tasks(tasks)
    check_methods(request.methods, request.oracle)
    check_adapters(request)
    if request.oracle is not None:
        read_oracle(request.oracle)
        for name in tasks if ORACLE in request.methods else ():
            check_oracle(request.oracle, name, request.scope, layers_of(model))
    return {
        "scope": request.scope,
        "layers": layers_of(model),
        "questions": request.questions,
        "seeds": list(range(request.seeds)),
        "keep": list(request.keeps),
        "device": device_of(model),
        "timing": {"batch": 1, "tokens": FORCED_TOKENS, "rounds": ROUNDS},
        "tasks": {name: _task(model, processor, name, request, progress) for name in tasks},
    }


def device_of(model: Any) -> str:
    """The device in words."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    threads = torch.get_num_threads()
    return f"{model.device.type}, {threads} thread{'s' * (threads > 1)}"


def _task(
    model: Any, processor: Any, name: str, request: Request, progress: Progress
) -> dict[str, Any]:
    task = task_of(name)
    samples = _samples(model, processor, name, task, request)
    measured_here = [method for method in request.methods if method != ORACLE]
    full = Candidate(1.0, FULL, model, (Plain(),) * request.seeds)
    found: Measured = {}
    made: dict[str, list[Candidate]] = {}
    for method in measured_here:
        progress(f"{name}: plans of {method}", 0, 1)
        made[method] = candidates(method, model, processor, name, request)
    of = sum(map(len, made.values())) + 1
    progress(f"{name}: full model", 0, of)
    whole = _points(full, samples, found)
    methods: dict[str, Any] = {}
    done = 1
    for method, some in made.items():
        points = [_told(full, whole, whole)]
        for candidate in some:
            progress(f"{name}: {method}", done, of)
            points.append(_told(candidate, _points(candidate, samples, found), whole))
            done += 1
        points.sort(key=lambda point: (point["settings"] == FULL, point["visits_share"]["mean"]))
        methods[method] = {"bound": False, "points": points}
    if ORACLE in request.methods:
        methods[ORACLE] = _oracle(model, name, request, whole)
    progress(f"{name}: done", of, of)
    return {
        "n": len(samples[0].items),
        "metrics": {
            metric: {"better": "lower" if metric in LOWER_IS_BETTER else "higher"}
            for metric in task.metrics
        },
        "methods": {method: methods[method] for method in request.methods},
    }


def _oracle(model: Any, name: str, request: Request, whole: Sequence[Point]) -> dict[str, Any]:
    """The oracle's points, and on what it was made beside what is measured here."""
    assert request.oracle is not None  # or check_methods had raised
    found = check_oracle(request.oracle, name, request.scope, layers_of(model))
    here = statistics.fmean(point.metrics[found["metric"]] for point in whole)
    return {
        "bound": True,
        "made_on": {**made_on(found), "full_here": here},
        "points": oracle_points(found, request.oracle, request.keeps),
    }


def _samples(model: Any, processor: Any, name: str, task: Task, request: Request) -> list[Sample]:
    count = request.questions
    asked = (questions_of(model, processor, name, count, seed=n) for n in range(request.seeds))
    samples = [Sample(model, processor, task, items) for items in asked]
    for sample in samples:
        if not sample.items:
            raise DataError(f"the task {name} has no question; ask for one at least.")
    return samples


def _points(candidate: Candidate, samples: Sequence[Sample], found: Measured) -> list[Point]:
    """The point of each seed; what has been measured for another method is not measured again."""
    points: list[Point] = []
    for seed, (sample, policy) in enumerate(zip(samples, candidate.policies, strict=True)):
        key = (id(candidate.model), json.dumps(to_settings(policy), sort_keys=True), seed)
        if key not in found:
            found[key] = measure(sample, candidate.model, policy)
        points.append(found[key])
    return points


def _told(candidate: Candidate, points: Sequence[Point], whole: Sequence[Point]) -> dict[str, Any]:
    """A point as JSON: statistics over seeds, and shares of what the full model takes."""
    told: dict[str, Any] = {"keep": candidate.keep, "settings": candidate.settings}
    told["metrics"] = {
        name: stat([point.metrics[name] for point in points]) for name in points[0].metrics
    }
    for name in points[0].cost:
        values = [point.cost[name] for point in points]
        told[name] = stat(values)
        if name in ("visits", "flops", "prefill_flops"):
            full = [one.cost[name] for one in whole]
            pairs = zip(values, full, strict=True)
            told[f"{name}_share"] = stat([None if v is None or not f else v / f for v, f in pairs])
    told["cosines"] = [
        statistics.fmean(layer) for layer in zip(*(p.cosines for p in points), strict=True)
    ]
    return told


def stat(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, spread and values over seeds; None where one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "spread": spread, "values": known}
