"""One point of a curve: what a policy keeps of the quality, and what it really costs.

The full model is every layer visited once, whatever policy a model carries.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, depth, trace
from trol.evaluation import metrics
from trol.evaluation.hidden_states import state_cosines
from trol.evaluation.tasks import Item, Task, batches, fitted, prompts, tokenizer_of
from trol.evaluation.timing import Timing, interleaved, ratio_and_spread, time_generate
from trol.policies.plain import Plain

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
