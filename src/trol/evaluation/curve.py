"""Curves as one JSON object: every method's points on every task, mean and spread over seeds.

A point is what a policy keeps of the quality, and what it really costs. The full model is every
layer visited once, whatever policy a model carries. Every *stat* is `{"mean", "spread",
"values"}`: over seeds, the spread a sample standard deviation or null, the values seed by seed;
null where it is not known::

    {"scope", "layers", "questions", "seeds": [int], "keep": [float], "device",
     "timing": {"batch", "tokens", "rounds"},
     "tasks": {task: {
        "n": int, "kind": "question" | "window",
        "splits": bool,           whether plans were chosen on another split, not a part of the file
        "metrics": {name: {"better": "higher" | "lower"}},   the first judges
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

Several processes may measure the points, each its part; the object is made where none is missing.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from typing import Any

import torch

from trol.depth import AbstractPolicy, depth, trace
from trol.depth.policy import Plain, to_settings
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError
from trol.evaluation import answers, curve_methods
from trol.evaluation.hidden_states import layers_of, state_cosines
from trol.evaluation.items import Item, batches, fitted_prompts, labelled, positions_of
from trol.evaluation.plan_search import JUDGING
from trol.evaluation.shards import WHOLE, Shard
from trol.evaluation.store import Measurements, items_digest
from trol.evaluation.tasks import Task, check_tasks, questions_of, task_of
from trol.evaluation.timing import (
    Timing,
    forced_traces,
    interleaved,
    ratio_and_spread,
    time_generate,
)

COMPARED = 32
"""Questions whose hidden states are compared with the full model's."""

COMPARED_TOKENS = 256
"""Tokens of plain text whose hidden states are."""

QUESTIONS = 200
"""Questions of each seed, where nobody says."""

WINDOWS, WINDOW = 4, 512
"""Windows of plain text of each seed, where nobody says, and tokens of each."""

ROUNDS = 2
"""Questions of each seed that are answered one by one, for FLOPs and for times."""

FORCED_TOKENS = 8
"""Tokens of such an answer, its end put off until there are as many."""

TIMED_PROMPT = 64
"""Tokens of plain text that such an answer goes on from, at most."""

FULL = {"plan": "all"}
"""Settings of the full model's point, which every curve has."""

CurveProgress = Callable[[str, int, int], None]
"""Takes what is being measured, points measured, points to measure."""

Costs = dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """The questions of one seed, and the full model that all policies are compared with."""

    model: Any
    processor: Any
    task: Task
    items: Sequence[Item]

    def alone(self) -> list[Any]:
        """Prompts of one question each."""
        new_tokens = max(FORCED_TOKENS, self.task.new_tokens)
        short = [replace(item, ids=item.ids[: 2 * TIMED_PROMPT]) for item in self.items[:ROUNDS]]
        return [fitted_prompts(self.model, self.processor, [item], new_tokens) for item in short]


@dataclass(frozen=True)
class Point:
    """The results of one policy on one sample."""

    metrics: dict[str, float]
    cost: Costs
    cosines: list[float]
    """Mean cosine of x_l to the full model's, l = 1 to L, over answer tokens. Shape: [L]."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn of one task: its questions, and the points before they are measured."""

    name: str
    samples: Sequence[Sample]
    """The questions of each seed."""
    full: curve_methods.Candidate
    by_method: dict[str, list[curve_methods.Candidate]]
    adapters: dict[int, str]
    """The models that carry an adapter, by their identity, and the names of these."""

    def jobs(self) -> dict[str, tuple[str, Callable[[], Point]]]:
        """Name of each point -> the method that asks for it first, and what measures it."""
        jobs: dict[str, tuple[str, Callable[[], Point]]] = {}
        for method, some in {"full model": [self.full], **self.by_method}.items():
            for one in some:
                for seed, name in enumerate(self.names(one)):
                    what = self.samples[seed], one.model, one.policies[seed]
                    jobs.setdefault(name, (method, partial(measure, *what)))
        return jobs

    def names(self, candidate: curve_methods.Candidate) -> list[str]:
        """The names of a candidate's points, seed by seed: the same for the same measurement."""
        adapter = self.adapters.get(id(candidate.model), "")
        return [
            json.dumps([self.name, asked, adapter, to_settings(policy), seed], sort_keys=True)
            for seed, (asked, policy) in enumerate(zip(self.asked, candidate.policies, strict=True))
        ]

    @cached_property
    def asked(self) -> list[str]:
        """A digest of each seed's questions: those of a file that was edited are others."""
        return [items_digest(sample.items) for sample in self.samples]


def measure(sample: Sample, model: Any, policy: AbstractPolicy) -> Point:
    """The point of `policy` on `model`.

    Costs of an answer token are those of one that the model reads: all but an answer's last.

    Returns:
        metrics by name; cost: `visits` and `flops` per answer token, `prefill_flops` of a question,
        `ms` per answer token and `prefill_ms` of a question, one question at a time, with
        `ms_ratio` and `prefill_ms_ratio` to the full model in the same rounds.
    """
    processor, items = sample.processor, sample.items
    values: dict[str, float] = {}
    with depth(model, policy):
        if sample.task.windows:
            values["loss"], visits = window_losses_and_visits(sample, model)
        else:
            texts, visits = answers_and_visits(sample, model)
            for metric in sample.task.metrics:
                if metric == "loss":
                    values[metric] = answers.mean_loss(
                        items, answers.losses(model, processor, items)
                    )
                else:
                    values[metric] = statistics.fmean(answers.scores(metric, texts, items))
        cost = _forced_cost(sample, model)
    compared = items[:COMPARED]
    if sample.task.windows:
        compared = [replace(items[0], ids=items[0].ids[:COMPARED_TOKENS])]
    cosines = state_cosines(model, processor, compared, policy)
    if visits is not None:
        cost["visits"] = visits
    return Point(values, {**cost, **_times(sample, model, policy)}, cosines)


def answers_and_visits(sample: Sample, model: Any) -> tuple[list[str], float | None]:
    """Greedy answers, and the layer visits of their mean token.

    The visits are None where no answer is longer than one token, which no layer ever reads.
    """
    texts: list[str] = []
    visited = tokens = 0
    for batch in answers.answer(
        model, sample.processor, sample.items, new_tokens=sample.task.new_tokens, traced=True
    ):
        texts += batch.texts
        read = batch.before_end[:, :-1].cpu()
        if batch.trace is not None and read.shape[1]:
            visits = batch.trace.visits[..., -read.shape[1] :].sum(0)  # Shape: [B, T - 1]
            visited += int((visits * read).sum())
            tokens += int(read.sum())
    return texts, visited / tokens if tokens else None


def window_losses_and_visits(sample: Sample, model: Any) -> tuple[float, float]:
    """Loss and layer visits of the mean token that is predicted."""
    values: list[float] = []
    visited = tokens = 0
    for some in batches(sample.items, answers.LOSS_BATCH):
        inputs = dict(labelled(model, sample.processor, some))
        predicted = (inputs["labels"] != IGNORED_LABEL).cpu()
        with trace(model) as seen:
            values += answers.mean_losses(model, inputs)
        visited += int(seen.visits.sum(0)[predicted].sum())
        tokens += int(predicted.sum())
    return answers.mean_loss(sample.items, values), visited / tokens


def _forced_cost(sample: Sample, model: Any) -> Costs:
    """Visits and FLOPs of answers of one length, one question at a time."""
    visits, flops, prefills = [], [], []
    for seen in forced_traces(model, sample.alone(), FORCED_TOKENS):
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


def _times(sample: Sample, model: Any, policy: AbstractPolicy) -> Costs:
    """Milliseconds beside the full model's, in turn, each round another question."""
    prompts_alone = sample.alone()

    def run(which: Any, policy: AbstractPolicy) -> Callable[[], Timing]:
        turns = cycle(prompts_alone)

        def once() -> Timing:
            with depth(which, policy), torch.inference_mode():
                return time_generate(which, next(turns), FORCED_TOKENS)

        return once

    runs = {"full": run(sample.model, Plain())}
    if policy != Plain():
        runs["point"] = run(model, policy)
    times = interleaved(runs, rounds=ROUNDS)
    full, point = times["full"], times.get("point", times["full"])
    costs: Costs = {}
    for name, phase in (("ms", "mean_decode"), ("prefill_ms", "prefill")):
        full_ms, point_ms = ([getattr(t, phase) for t in some] for some in (full, point))
        costs[name] = statistics.median(point_ms)
        costs[f"{name}_ratio"] = ratio_and_spread(full_ms, point_ms)[0]
    return costs


def curve(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    request: curve_methods.Request,
    *,
    kept: Measurements | None = None,
    shard: Shard = WHOLE,
    progress: CurveProgress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Quality against cost, of every method on every task.

    Args:
        model: the model, plain or attached; what it carries stays attached.
        processor: its processor; of a text decoder, its tokenizer.
        tasks: names, as `task_of` takes them.
        request: methods, shares, seeds and what they need.
        kept: where points are kept, and those of other processes found.
        shard: which part of the points is measured here.
        progress: called before each point.

    Returns:
        The object of the module's docstring; while other parts are missing, `{"complete": False,
        "missing": ["1/2", ...]}`.

    Raises:
        UsageError: a task, method or share is unknown, a method lacks what it needs, or the
            oracle is of another task, scope or stack.
        HostError: a task shows pictures to a model that reads text alone.
        DataError: a task has no questions, or the oracle's folder is damaged.
    """
    check_tasks(tasks)
    curve_methods.check_methods(request.methods, request.oracle)
    curve_methods.check_adapters(request)
    if request.oracle is not None and curve_methods.ORACLE in request.methods:
        for name in tasks:
            curve_methods.oracle_of(request.oracle, name, request.scope, layers_of(model))
    kept = kept or Measurements()
    drawings = [_drawing(model, processor, name, request, progress) for name in tasks]
    for drawing in drawings:
        _measure_part(drawing, kept, shard, progress)
    kept.look_again()
    parts = [
        number % shard[1]
        for drawing in drawings
        for number, name in enumerate(drawing.jobs())
        if name not in kept.values
    ]
    if parts:
        missing = [f"{part}/{shard[1]}" for part in sorted(set(parts))]
        return {"complete": False, "missing": missing}
    return {
        **described(model, request),
        "tasks": {one.name: _task(model, one, request, kept) for one in drawings},
    }


def described(model: Any, request: curve_methods.Request) -> dict[str, Any]:
    """The first part of the object: what was asked, and where it is measured."""
    return {
        "scope": request.scope,
        "layers": layers_of(model),
        "questions": request.questions or QUESTIONS,
        "seeds": list(range(request.seeds)),
        "keep": list(request.keeps),
        "device": _device_name(model),
        "timing": {"batch": 1, "tokens": FORCED_TOKENS, "rounds": ROUNDS},
    }


def _device_name(model: Any) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    threads = torch.get_num_threads()
    return f"{model.device.type}, {threads} thread{'s' * (threads > 1)}"


def _drawing(
    model: Any, processor: Any, name: str, request: curve_methods.Request, progress: CurveProgress
) -> Drawing:
    task = task_of(name)
    samples = [
        Sample(model, processor, task, _items(model, processor, name, request, seed))
        for seed in range(request.seeds)
    ]
    if not all(sample.items for sample in samples):
        raise DataError(f"the task {name} has no question; ask for one at least.")
    full = curve_methods.Candidate(1.0, FULL, model, (Plain(),) * request.seeds)
    by_method: dict[str, list[curve_methods.Candidate]] = {}
    for method in request.methods:
        if method != curve_methods.ORACLE:
            progress(f"{name}: plans of {method}", 0, 1)
            by_method[method] = curve_methods.candidates(method, model, processor, name, request)
    adapters = {id(other): folder for folder, other in (request.adapters or {}).items()}
    return Drawing(name, samples, full, by_method, adapters)


def _measure_part(
    drawing: Drawing, kept: Measurements, shard: Shard, progress: CurveProgress
) -> None:
    """Measures each point of this part, once, as far as it is not kept."""
    mine = list(drawing.jobs().items())[shard[0] :: shard[1]]
    for done, (name, (method, work)) in enumerate(mine):
        progress(f"{drawing.name}: {method}", done, len(mine))
        kept.value(name, lambda work=work: asdict(work()))
    progress(f"{drawing.name}: done", len(mine), len(mine))


def _task(
    model: Any, drawing: Drawing, request: curve_methods.Request, kept: Measurements
) -> dict[str, Any]:
    task = drawing.samples[0].task

    def points_of(candidate: curve_methods.Candidate) -> list[Point]:
        return [Point(**kept.values[name]) for name in drawing.names(candidate)]

    whole = points_of(drawing.full)
    methods: dict[str, Any] = {}
    for method, some in drawing.by_method.items():
        points = [_as_json(one, points_of(one), whole) for one in (drawing.full, *some)]
        points.sort(key=lambda point: (point["settings"] == FULL, point["visits_share"]["mean"]))
        methods[method] = {"bound": False, "points": points}
    if curve_methods.ORACLE in request.methods:
        assert request.oracle is not None  # or check_methods had raised
        result = curve_methods.oracle_of(
            request.oracle, drawing.name, request.scope, layers_of(model)
        )
        here = statistics.fmean(point.metrics[result.metric] for point in whole)
        methods[curve_methods.ORACLE] = {
            "bound": True,
            "made_on": {**curve_methods.made_on(result), "full_here": here},
            "points": curve_methods.oracle_points(result, request.oracle, request.keeps),
        }
    return {
        "n": len(drawing.samples[0].items),
        "kind": "window" if task.windows else "question",
        "splits": task.splits,
        "metrics": {
            metric: {"better": "lower" if metric in answers.LOWER_IS_BETTER else "higher"}
            for metric in task.metrics
        },
        "methods": {method: methods[method] for method in request.methods},
    }


def _items(
    model: Any, processor: Any, name: str, request: curve_methods.Request, seed: int
) -> list[Item]:
    """The questions of one seed; of a file of the user's, none that plans were chosen by."""
    windows = task_of(name).windows
    return questions_of(
        model,
        processor,
        name,
        request.questions or (WINDOWS if windows else QUESTIONS),
        seed=seed,
        window=min(WINDOW, positions_of(model) or WINDOW) if windows else None,
        part=JUDGING,
    )


def _as_json(
    candidate: curve_methods.Candidate, points: Sequence[Point], whole: Sequence[Point]
) -> dict[str, Any]:
    """A point as JSON: statistics over seeds, and shares of the full model's costs."""
    result: dict[str, Any] = {"keep": candidate.keep, "settings": candidate.settings}
    result["metrics"] = {
        name: stat([point.metrics[name] for point in points]) for name in points[0].metrics
    }
    for name in points[0].cost:
        values = [point.cost[name] for point in points]
        result[name] = stat(values)
        if name in ("visits", "flops", "prefill_flops"):
            pairs = zip(values, (one.cost[name] for one in whole), strict=True)
            shares = [None if v is None or not full else v / full for v, full in pairs]
            result[f"{name}_share"] = stat(shares)
    layers = zip(*(point.cosines for point in points), strict=True)
    result["cosines"] = [statistics.fmean(layer) for layer in layers]
    return result


def stat(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, spread and values over seeds; None where one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "spread": spread, "values": known}
