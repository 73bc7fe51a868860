"""Drafts that are chosen by measuring a model.

A draft that agrees with the model at many positions, and costs little, gains most:

    speed-up = tokens per round / (k c + v)

where k tokens are drafted a round, c is a draft's step and v a verifying pass over k + 1 tokens,
both in steps of the model's own policy (https://arxiv.org/abs/2211.17192, theorem 3.8, where
tokens per round is (1 - a^(k+1)) / (1 - a) for agreement a; here the rounds are played through).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, Plan, attached
from trol.depth.attachment import decoding
from trol.depth.call import generating
from trol.depth.policy import Plain
from trol.depth.roles import Prompt
from trol.errors import UsageError
from trol.evaluation.answers import StepsDone, before_end, greedy
from trol.evaluation.items import Item, batches, prompts
from trol.evaluation.removal import Layers, Removal, measurements
from trol.evaluation.shared_layers import SharedRun, SharedRuns
from trol.evaluation.store import Measurements
from trol.evaluation.timing import interleaved
from trol.policies.planned import Planned, kept_count, plan_keeping, uniform
from trol.speculation.loop import ForwardPasses, with_policy

BATCH = 16
"""Answers that drafts are compared with at once."""

MOST_TOKENS = 8
"""The longest draft that is tried. Unit: tokens."""

Rows = list[list[bool]]
"""For each answer, at which of its tokens a draft says what the model says."""


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
    progress: StepsDone = lambda done, of: None,
    measured: Measurements | None = None,
) -> DraftChoice:
    """The plan and the number of tokens that promise the greatest speed-up on these prompts.

    The candidates are early exits, evenly spaced layers, and layers taken away one by one, each
    time the one that the agreement misses least (`removed`; as CLaSp,
    https://arxiv.org/abs/2505.24196, but once for all prompts). Every plan is judged by one pass
    over the model's own greedy answers.

    Args:
        model: a model, plain or attached; its own policy is what verifies.
        processor: what prepares its inputs.
        items: questions, of a split that the plan is not judged by; references are not read.
        keep: max(1, round(keep * L)) layers stay; None to choose that number too.
        new_tokens: longest answer that drafts are compared with.
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
        count = stack.depth_layers
        absent = stack.depth_absent(stack.depth_policy_in_force())
        stays = [layer for layer in range(count) if layer not in absent]
        kept = None if keep is None else kept_count(count, keep)
        own = [generate_answers(model, processor, b, new_tokens) for b in batches(items, BATCH)]
        if not any(bool(one.counted.any()) for one in own):
            raise UsageError(
                "the model answers every prompt with a single token, so there is nothing to draft; "
                "give prompts with longer answers, or raise new_tokens."
            )
        one = generate_answers(model, processor, items[:1], 1)
        costs = costs_of(host, stack, one, stays, rounds)
        agreed, measured = Agreement(model, stack, own).of, measured or Measurements()
        candidates = _candidates(agreed, stays, kept, costs, progress=progress, measured=measured)
    choices = []
    for layers, rows in candidates.items():
        speedup, tokens = costs.best(rows, len(layers))
        choices.append(DraftChoice(plan_keeping(layers, count), tokens, _share(rows), speedup))
    return max(choices, key=lambda choice: choice.predicted_speedup)


def _candidates(
    agreed: Callable[[Layers, Layers], Rows],
    stays: Sequence[int],
    kept: int | None,
    costs: "Costs",
    *,
    progress: StepsDone,
    measured: Measurements,
) -> dict[Layers, Rows]:
    """Layers -> at which tokens they agree, for every candidate.

    Fewer layers agree at fewer tokens: where even a draft of a single layer that agreed as well
    would not do better than the best so far, no shorter ones are measured.
    """
    counts = range(len(stays) - 1, 0, -1) if kept is None else (min(kept, len(stays)),)
    count = len(stays) - min(counts, default=1)
    of = 2 * len(counts) + measurements(len(stays), count)
    rows_of: dict[Layers, Rows] = {}
    once, best = measured.counted(progress, of), 0.0

    def rows(layers: Layers, base: Layers) -> Rows:
        rows_of[layers] = once(" ".join(map(str, layers)), lambda: agreed(layers, base))
        return rows_of[layers]

    def hopeless(layers: Layers) -> bool:
        nonlocal best
        right = rows(layers, tuple(stays))
        best = max(best, costs.best(right, len(layers))[0])
        return kept is None and costs.best(right, 1)[0] <= best

    removal = Removal(stays, lambda layers, base: -_share(rows(layers, base)))
    for _ in removal.take(count):
        if hopeless(removal.left):
            break
    for places in (range, lambda number: uniform(len(stays), number, 0)):  # early exit, even layers
        for number in counts:
            if hopeless(tuple(stays[place] for place in places(number))):
                break
    return {layers: right for layers, right in rows_of.items() if len(layers) in set(counts)}


@dataclass(frozen=True)
class Costs:
    """Times of passes; a step of the model's own policy is 1."""

    shallow: float
    """One token through one layer."""
    layer: float
    """One token through one layer more."""
    verifying: Mapping[int, float]
    """k -> one pass over k + 1 tokens."""

    def speedup(self, rows: Rows, layers: int, k: int) -> float:
        """Tokens per second with drafts of k tokens through so many layers, over those without."""
        drafting = self.shallow + self.layer * (layers - 1)
        return tokens_per_round(rows, k) / (k * drafting + self.verifying[k])

    def best(self, rows: Rows, layers: int) -> tuple[float, int]:
        """The greatest speed-up of such a draft, and of how many tokens; the fewest of equal."""
        speedups = ((self.speedup(rows, layers, k), k) for k in range(1, MOST_TOKENS + 1))
        return max(speedups, key=lambda speedup: speedup[0])


def tokens_per_round(rows: Rows, k: int) -> float:
    """Tokens that a round of k drafts gains, played through: those right in a row, and one more."""
    rounds = 0
    for row in rows:
        at = 0
        while at < len(row):
            drafts = row[at : at + k]
            at += next((i for i, right in enumerate(drafts) if not right), len(drafts)) + 1
            rounds += 1
    return sum(map(len, rows)) / rounds


def _share(rows: Rows) -> float:
    """At how many of the tokens the draft is right, in [0, 1]."""
    return sum(map(sum, rows)) / sum(map(len, rows))


@dataclass(frozen=True)
class GreedyAnswers:
    """Answers of the model, and the cache of their prompts."""

    passes: ForwardPasses
    """Right behind the prompt."""
    ids: Tensor
    """Prompts and answers. Shape: [B, T + N]."""
    prompt: int
    """T."""
    counted: Tensor
    """Which answer tokens but the first come before the end. Shape: [B, N - 1]."""


def generate_answers(
    model: Any, processor: Any, items: Sequence[Item], new_tokens: int
) -> GreedyAnswers:
    """The model's greedy answers, and its cache of the prompts."""
    inputs = prompts(processor, items).to(model.device)
    new = greedy(model, inputs, new_tokens)
    prompted: list[ForwardPasses] = []

    def read(host: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """A `custom_generate` that reads the prompt alone."""
        config = kwargs.pop("generation_config")
        for name in ("logits_processor", "stopping_criteria"):
            del kwargs[name]
        prompted.append(ForwardPasses(host, kwargs))
        prompted[0].prompt(input_ids, config)
        return input_ids

    greedy(model, inputs, 1, custom_generate=read)
    ids = torch.cat([inputs["input_ids"], new], 1)
    counted = before_end(model, new)[:, :-1]
    return GreedyAnswers(prompted[0], ids, inputs["input_ids"].shape[1], counted)


class Agreement:
    """One pass of a draft over each batch of answers, behind the model's own prompts.

    Args:
        model: the model, attached.
        stack: its layers.
        answers: of the model itself.
    """

    def __init__(self, model: Any, stack: Any, answers: Sequence[GreedyAnswers]) -> None:
        self.stack = stack
        self.answers = [one for one in answers if one.ids.shape[1] > one.prompt + 1]
        self.runs = SharedRuns([self._run(model, one) for one in self.answers])

    def of(self, layers: Layers, base: Layers) -> Rows:
        """Where a draft of these layers agrees; its first layers are those of the draft `base`."""
        rows: Rows = []
        plan, before = (plan_keeping(some, self.stack.depth_layers) for some in (layers, base))
        for one, best in zip(self.answers, self.runs.under(plan, before), strict=True):
            right = best == one.ids[:, one.prompt + 1 :]
            pairs = zip(right.tolist(), one.counted.tolist(), strict=True)
            rows += [[r for r, on in zip(*pair, strict=True) if on] for pair in pairs]
        return [row for row in rows if row]

    def _run(self, model: Any, one: GreedyAnswers) -> SharedRun:
        new = one.ids.shape[1] - one.prompt - 1

        def best(policy: AbstractPolicy) -> Tensor:
            with with_policy(self.stack, policy):
                return _behind(one, one.ids[:, :-1], new).argmax(-1)

        numbers = len(one.ids) * new * self.stack.config.hidden_size
        return SharedRun(model, best, Planned, holds=True, numbers=numbers)


def _behind(one: GreedyAnswers, ids: Tensor, new: int) -> Tensor:
    """Logits of `new` tokens behind the prompt, on a cache of their own. Shape: [B, new, V]."""
    passes = one.passes.fork(planes=False)
    passes.extend(new)
    return passes.run(ids, new)


def costs_of(host: Any, stack: Any, one: GreedyAnswers, stays: Sequence[int], rounds: int) -> Costs:
    """Times a step of the model, of shallow and deep drafts, and verifying passes; one row."""
    own = stack.depth_policy_in_force()
    prompt = one.ids[:, : one.prompt]
    start = Prompt(one.prompt, columns=one.prompt, ids=one.prompt)

    def timed(new: int, policy: Any) -> float:
        ids = torch.cat([prompt, one.ids[:, -1:].expand(-1, new)], 1)
        began = time.perf_counter()
        with with_policy(stack, policy), generating(host, start):
            _behind(one, ids, new)[0, -1].argmax().item()  # waits for the device
        return time.perf_counter() - began

    runs: dict[str, Callable[[], float]] = {
        name: partial(timed, 1, Planned(plan_keeping(layers, stack.depth_layers)))
        for name, layers in (("shallow", stays[:1]), ("deep", stays))
    }
    runs |= {str(new): partial(timed, new, own) for new in range(1, MOST_TOKENS + 2)}
    taken = {name: median(times) for name, times in interleaved(runs, rounds=rounds).items()}
    step = taken["1"]
    layer = max(taken["deep"] - taken["shallow"], 0) / max(len(stays) - 1, 1) / step
    verifying = {k: taken[str(k + 1)] / step for k in range(1, MOST_TOKENS + 1)}
    return Costs(taken["shallow"] / step, layer, verifying)
