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

One point of a curve: what a policy keeps of the quality, and what it really costs.

The full model is every layer visited once, whatever policy a model carries.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, depth, trace
from trol.depth.policy import Plain, to_settings
from trol.errors import DataError
from trol.evaluation import metrics
from trol.evaluation.curve_methods import (
    ORACLE,
    Candidate,
    Request,
    candidates,
    check_adapters,
    check_methods,
    check_oracle,
    layers_of,
    made_on,
    oracle_points,
    read_oracle,
)
from trol.evaluation.hidden_states import state_cosines
from trol.evaluation.tasks import (
    Item,
    Task,
    batches,
    check_tasks,
    fitted,
    prompts,
    questions_of,
    task_of,
    tokenizer_of,
)
from trol.evaluation.timing import Timing, interleaved, ratio_and_spread, time_generate

COMPARED = 32
"""Questions whose hidden states are compared with the full model's."""

ROUNDS = 5
"""Questions that are answered one by one, for FLOPs and for times."""

FORCED_TOKENS = 16
"""Tokens of such an answer, its end put off until there are as many."""

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """The questions of one seed, and the full model that all policies are compared with."""

    model: Any
    processor: Any
    task: Task
    items: Sequence[Item]

    def alone(self) -> list[Any]:
        """Prompts of one question each."""
        some = [
            fitted(self.model, self.processor, item, max(FORCED_TOKENS, self.task.new_tokens))
            for item in self.items[:ROUNDS]
        ]
        return [prompts(self.processor, [item]).to(self.model.device) for item in some]


@dataclass(frozen=True)
class Point:
    """What one policy did on one sample."""

    metrics: dict[str, float]
    cost: Numbers
    cosines: list[float]
    """Mean cosine of x_l to the full model's, l = 1 to L, over answer tokens. Shape: [L]."""


def measure(sample: Sample, model: Any, policy: AbstractPolicy) -> Point:
    """The point of `policy` on `model`.

    Costs of an answer token are those of one that the model reads: all but an answer's last.

    Returns:
        metrics by name; cost: `visits` and `flops` per answer token, `prefill_flops` of a question,
        `ms` per answer token and `prefill_ms` of a question, one question at a time, with
        `ms_ratio` and `prefill_ms_ratio` to the full model in the same rounds.
    """
    task, items = sample.task, sample.items
    found: dict[str, float] = {}
    with depth(model, policy):
        given, visits = generated(sample, model)
        for metric in task.metrics:
            if metric == "loss":
                each: Sequence[float] = metrics.losses(model, sample.processor, items)
            else:
                each = metrics.scores(metric, given, items)
            found[metric] = statistics.fmean(each)
        counted = _counted(sample, model)
    compared = items[:COMPARED]
    cosines = state_cosines(model, sample.processor, compared, policy)
    if visits is not None:
        counted["visits"] = visits
    return Point(found, {**counted, **_timed(sample, model, policy)}, cosines)


def generated(sample: Sample, model: Any) -> tuple[list[str], float | None]:
    """Greedy answers, as `tasks.answers` gives them, and the layer visits of their mean token.

    The visits are None where no answer is longer than one token, which no layer ever reads.
    """
    texts: list[str] = []
    visited = tokens = 0
    tokenizer, longest = tokenizer_of(sample.processor), sample.task.new_tokens
    for some in batches(sample.items):
        fitting = [fitted(model, sample.processor, item, longest) for item in some]
        inputs = prompts(sample.processor, fitting).to(model.device)
        with trace(model) as seen, torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        if new.shape[1] > 1:
            read = before_end(new, model)[:, :-1].cpu()
            made = seen.visits[..., -read.shape[1] :].sum(0)  # Shape: [B, T - 1]
            visited += int((made * read).sum())
            tokens += int(read.sum())
    return texts, visited / tokens if tokens else None


def before_end(new: Tensor, model: Any) -> Tensor:
    """Which new tokens come before the end of their answer. Shape: [B, T]."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    return ended.long().cumsum(1) == 0


def _counted(sample: Sample, model: Any) -> Numbers:
    """Visits and FLOPs of answers of one length, one question at a time."""
    visits, flops, prefills = [], [], []
    for inputs in sample.alone():
        with trace(model) as seen, torch.inference_mode():
            time_generate(model, inputs, FORCED_TOKENS)
        steps = FORCED_TOKENS - 1  # the last token is never read
        visits.append(int(seen.visits[..., -steps:].sum()) / steps)
        prefills.append(seen.flops[0])
        flops += seen.flops[1:]
    return {
        "visits": statistics.fmean(visits),
        "flops": _mean(flops),
        "prefill_flops": _mean(prefills),
    }


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _timed(sample: Sample, model: Any, policy: AbstractPolicy) -> Numbers:
    """Milliseconds beside the full model's, in turn, each round another question."""
    prompts_alone = sample.alone()

    def run(which: Any, followed: AbstractPolicy) -> Callable[[], Timing]:
        turns = cycle(prompts_alone)

        def once() -> Timing:
            with depth(which, followed), torch.inference_mode():
                return time_generate(which, next(turns), FORCED_TOKENS)

        return once

    if policy == Plain():
        both = {"full": run(sample.model, policy)}
    else:
        both = {"full": run(sample.model, Plain()), "point": run(model, policy)}
    times = interleaved(both, rounds=ROUNDS)
    full, point = times["full"], times.get("point", times["full"])
    found: Numbers = {}
    for name, phase in (("ms", "mean_decode"), ("prefill_ms", "prefill")):
        full_ms, point_ms = ([getattr(t, phase) for t in some] for some in (full, point))
        found[name] = statistics.median(point_ms)
        found[f"{name}_ratio"] = ratio_and_spread(full_ms, point_ms)[0]
    return found


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
