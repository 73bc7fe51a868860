"""Plans that are chosen by measuring a model: which layers it misses least.

Which plan drafts best for speculation: predicted from agreement and timed passes, then measured.

A draft that agrees with the model at many positions, and costs little, gains most:

    speed-up = tokens per round / (k c + v)

where k tokens are drafted a round, c is a draft's step and v a verifying pass over k + 1 tokens,
both in steps of the model's own policy (https://arxiv.org/abs/2211.17192, theorem 3.8, where
tokens per round is (1 - a^(k+1)) / (1 - a) for agreement a; here the rounds are played through).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trol.depth import Plan, Scope, attached, depth
from trol.depth.attachment import decoding
from trol.depth.call import Decoding
from trol.depth.policy import Plain
from trol.errors import UsageError, unknown
from trol.evaluation.draft_agreement import (
    Costs,
    Followed,
    Rows,
    agreement,
    costs_of,
    follow,
    share,
)
from trol.evaluation.hidden_states import influences, measurements, removed
from trol.evaluation.kept import Measurements
from trol.evaluation.metrics import losses
from trol.evaluation.tasks import Item, batches, prompts
from trol.evaluation.timing import interleaved, ratio_and_spread
from trol.host.layers import find_decoder, layer_list
from trol.policies.planned import Planned, kept_count, plan_keeping, uniform
from trol.speculation import speculate

Progress = Callable[[int, int], None]
"""(measurements made, measurements to make)."""

CHOSEN = {
    "influence": "trol.evaluation.plan_search:influence",
    "greedy": "trol.evaluation.plan_search:greedy",
    "draft": "trol.evaluation.plan_search:draft",
}
"""Method -> where its function is, which takes what `chosen_plan` does."""


def chosen_plan(
    method: str,
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope = "answer",
    progress: Progress = lambda done, of: None,
    measured: Measurements | None = None,
) -> Plan:
    """The plan of max(1, round(keep * L)) layers that `method` finds best on `items`.

    Args:
        method: `influence` (measures once), `greedy` (once for each layer that may go, then for
            the most promising ones at every step) or `draft`.
        model: a model, plain or attached; a policy that it carries is out of force meanwhile.
        processor: what prepares its inputs.
        items: questions with answers, of a split that the plan is not judged by.
        keep: the share of layers that stay.
        scope: whose tokens will skip: the paper's kind is `answer`.
        progress: called before the first measurement, and after each.
        measured: keeps what is measured, and has what was measured before.

    Raises:
        UsageError: the method is unknown, `keep` is outside (0, 1], or no items are given.
    """
    if method not in CHOSEN:
        raise unknown("method", method, CHOSEN)
    kept_count(_count(model), keep)
    if not items:
        raise UsageError(f"{method} measures on questions, but got none; give at least one.")
    module, _, name = CHOSEN[method].partition(":")
    choose = getattr(import_module(module), name)
    measured = measured or Measurements()
    return choose(model, processor, items, keep, scope=scope, progress=progress, measured=measured)


def influence(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope,
    progress: Progress,
    measured: Measurements,
) -> Plan:
    """The layers of greatest block influence, measured once; of equal ones the earlier stays.

    ShortGPT (https://arxiv.org/abs/2403.03853, section 3.3).
    """
    progress(len(measured.found), 1)
    found = measured.value("influences", lambda: influences(model, processor, items, scope))
    progress(1, 1)
    ranked = sorted(range(len(found)), key=lambda layer: (-found[layer], layer))
    return plan_keeping(ranked[: kept_count(len(found), keep)], len(found))


def greedy(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope,
    progress: Progress,
    measured: Measurements,
) -> Plan:
    """Layers taken away one by one, each time the one without which the answers' loss is least.

    After the first step only the most promising layers are measured again (`removing`). Of equal
    losses the earliest layer goes. No layer is kept for its place.
    """
    layers = _count(model)
    count = layers - kept_count(layers, keep)
    of = measurements(layers, count)

    def loss(stays: tuple[int, ...]) -> float:
        plan = plan_keeping(stays, layers)
        before = len(measured.found)
        found = measured.value(str(plan), lambda: plan_loss(model, processor, items, plan, scope))
        if len(measured.found) > before:
            progress(len(measured.found), of)
        return found

    progress(min(len(measured.found), of), of)
    gone = list(removed(range(layers), count, loss))
    return plan_keeping(set(range(layers)).difference(gone), layers)


def plan_loss(model: Any, processor: Any, items: Sequence[Item], plan: Plan, scope: Scope) -> float:
    """Mean over items of the answers' loss under a plan; what is no number counts as infinite."""
    with depth(model, Planned(plan, scope=scope)):
        found = losses(model, processor, items)
    mean = sum(found) / len(found)
    return math.inf if math.isnan(mean) else mean


def _count(model: Any) -> int:
    layers = layer_list(find_decoder(model))
    assert layers is not None  # or find_decoder had raised
    return len(layers)


BATCH = 16
"""Answers followed at once."""

DraftProgress = Callable[[int, int], None]
"""(plans measured, plans to measure)."""


@dataclass(frozen=True)
class DraftChoice:
    """The draft that promises most, and what it promises."""

    plan: Plan
    tokens: int
    """Tokens to draft a round."""
    agreement: float
    """Share of the model's own greedy tokens that the draft says too, in [0, 1]."""
    predicted_speedup: float
    """Tokens per second with this draft, over those without."""


def draft_plan(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float | None = None,
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    progress: DraftProgress = lambda done, of: None,
    measured: Measurements | None = None,
) -> DraftChoice:
    """The plan and the number of tokens that promise the greatest speed-up on these prompts.

    Early exits, evenly spaced layers, and layers taken away one by one, each time the one that
    the agreement misses least (`removing`; as CLaSp, https://arxiv.org/abs/2505.24196, but once for
    all prompts). Every plan is judged by one pass over the model's own greedy answers.

    Args:
        model: a model, plain or attached; its own policy is what verifies.
        processor: what prepares its inputs.
        items: questions, of a split that the plan is not judged by; references are not read.
        keep: max(1, round(keep * L)) layers stay; None to choose that number too.
        new_tokens: longest answer followed.
        rounds: timed passes of each kind.
        progress: called before the first plan, and after each.
        measured: keeps what is measured of each plan, and has what was measured before.

    Raises:
        UsageError: no items, `keep` outside (0, 1], or answers of a single token.
    """
    if not items:
        raise UsageError("a draft is chosen on prompts, but got none; give at least one item.")
    with torch.no_grad(), decoding(model, lambda _host, kwargs: kwargs, Plain()):
        host, stack = attached(model)
        absent = stack.depth_absent(stack.depth_policy_in_force())
        stays = [layer for layer in range(stack.depth_layers) if layer not in absent]
        kept = None if keep is None else kept_count(stack.depth_layers, keep)
        followed = [follow(model, processor, some, new_tokens) for some in batches(items, BATCH)]
        _check_answers(followed)
        agreed = partial(agreement, stack, followed)
        costs = costs_of(host, stack, follow(model, processor, items[:1], 1), stays, rounds)
        found = _measure(
            agreed, stays, kept, costs, progress=progress, measured=measured or Measurements()
        )
        return _best(found, costs, stack.depth_layers)


def _best(measured: Mapping[tuple[int, ...], Rows], costs: Costs, count: int) -> DraftChoice:
    """The candidate and the number of drafts that promise most; `count` is L."""
    choices = []
    for layers, rows in measured.items():
        speedup, k = costs.best(rows, len(layers))
        choices.append(DraftChoice(plan_keeping(layers, count), k, share(rows), speedup))
    return max(choices, key=lambda choice: choice.predicted_speedup)


def draft(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope,
    progress: DraftProgress,
    measured: Measurements,
) -> Plan:
    """`draft_plan`'s plan for a share of layers; drafts are answers, whatever the scope."""
    del scope
    return draft_plan(model, processor, items, keep, progress=progress, measured=measured).plan


def measured_speed(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    plan: Plan | str,
    tokens: int,
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    batch: int = 1,
) -> dict[str, Any]:
    """What a draft really gains: greedy answers to all items, with it and without, in turn.

    `batch` items are answered at once.

    Returns:
        `{"acceptance", "tokens_per_round", "tokens_per_second": {"plain", "speculative"}, "ratio",
        "spread", "identical"}`; ratio is the median over rounds of plain / speculative seconds.

    Raises:
        UsageError: the plan does not fit, `tokens` < 1, or no items.
    """
    if not items:
        raise UsageError("speed is measured on prompts, but got none; give at least one item.")
    asked = [prompts(processor, some).to(model.device) for some in batches(items, batch)]
    answer = partial(_timed, model, asked, new_tokens)
    with speculate(model, plan, tokens=tokens) as spoken:
        # Both run attached, so that what is compared is the drafts alone.
        plain_loop = partial(answer, lambda _host, kwargs: kwargs)
        runs = {"plain": plain_loop, "speculative": partial(answer, None)}
        made = interleaved(runs, rounds=rounds)
    times = {name: [seconds for _, seconds in all_of] for name, all_of in made.items()}
    ratio, spread = ratio_and_spread(times["speculative"], times["plain"])
    plain, drafted = (made[name][-1][0] for name in ("plain", "speculative"))
    given = sum(int((new != _padding(model)).sum()) for new in plain)
    return {
        "acceptance": spoken.acceptance,
        "tokens_per_round": spoken.tokens_per_round,
        "tokens_per_second": {name: given / median(taken) for name, taken in times.items()},
        "ratio": ratio,
        "spread": spread,
        "identical": all(map(torch.equal, plain, drafted)),
    }


def _timed(
    model: Any, asked: Sequence[Any], new_tokens: int, loop: Decoding | None
) -> tuple[list[Tensor], float]:
    """Greedy new ids [B, N] of each batch, and the seconds; `loop` in place of what is in force."""
    began = time.perf_counter()
    made: list[Tensor] = []
    with nullcontext() if loop is None else decoding(model, loop, Plain()):
        for inputs in asked:
            ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            made.append(ids[:, inputs["input_ids"].shape[1] :])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made, time.perf_counter() - began


def _check_answers(followed: Sequence[Followed]) -> None:
    if not any(bool(one.counted.any()) for one in followed):
        raise UsageError(
            "the model answers every prompt with a single token, so there is nothing to draft; "
            "give prompts with longer answers, or raise new_tokens."
        )


def _measure(
    agreed: Callable[[tuple[int, ...]], Rows],
    stays: Sequence[int],
    kept: int | None,
    costs: Costs,
    *,
    progress: DraftProgress,
    measured: Measurements,
) -> dict[tuple[int, ...], Rows]:
    """Layers -> at which tokens they agree, for every candidate.

    Fewer layers agree at fewer tokens: where even a draft of a single layer that agreed as well
    would not do better than the best so far, no shorter ones are measured.
    """
    counts = range(len(stays) - 1, 0, -1) if kept is None else (min(kept, len(stays)),)
    count = len(stays) - min(counts, default=1)
    of = 2 * len(counts) + measurements(len(stays), count)
    found: dict[tuple[int, ...], Rows] = {}

    def rows_of(layers: tuple[int, ...]) -> Rows:
        name, before = " ".join(map(str, layers)), len(measured.found)
        found[layers] = measured.value(name, lambda: agreed(layers))
        if len(measured.found) > before:
            progress(min(len(measured.found), of), of)
        return found[layers]

    progress(min(len(measured.found), of), of)
    best = 0.0

    def hopeless(layers: tuple[int, ...]) -> bool:
        nonlocal best
        rows = rows_of(layers)
        best = max(best, costs.best(rows, len(layers))[0])
        return kept is None and costs.best(rows, 1)[0] <= best

    left = tuple(stays)
    for gone in removed(stays, count, lambda layers: -share(rows_of(layers))):
        left = tuple(layer for layer in left if layer != gone)
        if hopeless(left):
            break
    for layers_of in (_first, _even):
        for one in counts:
            if hopeless(layers_of(stays, one)):
                break
    return {layers: rows for layers, rows in found.items() if len(layers) in set(counts)}


def _first(stays: Sequence[int], count: int) -> tuple[int, ...]:
    """The first layers of those that stay: an early exit."""
    return tuple(stays[:count])


def _even(stays: Sequence[int], count: int) -> tuple[int, ...]:
    """Evenly spaced layers of those that stay."""
    return tuple(stays[i] for i in uniform(len(stays), count, 0))


def _padding(model: Any) -> int:
    """What fills rows that have ended; -1 where nothing does."""
    found = model.generation_config.pad_token_id
    return -1 if found is None else int(found)
