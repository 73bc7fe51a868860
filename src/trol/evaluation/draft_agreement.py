"""The model's own answers, followed by drafts: where they agree, and what their passes cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trol.depth.call import generating
from trol.depth.roles import Prompt
from trol.evaluation.tasks import Item, prompts
from trol.evaluation.timing import interleaved
from trol.policies.planned import Planned, plan_keeping
from trol.speculation.loop import ForwardPasses, with_policy

MOST_TOKENS = 8
"""The longest draft that is tried. Unit: tokens."""

Rows = list[list[bool]]
"""For each answer, at which of its tokens a draft says what the model says."""


@dataclass(frozen=True)
class Costs:
    """Steps of the model's own policy = 1."""

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
        return max(
            ((self.speedup(rows, layers, k), k) for k in range(1, MOST_TOKENS + 1)),
            key=lambda found: found[0],
        )


@dataclass(frozen=True)
class Followed:
    """Answers of the model, and the cache of their prompts."""

    passes: ForwardPasses
    """Right behind the prompt."""
    ids: Tensor
    """Prompts and answers. Shape: [B, T + N]."""
    prompt: int
    """T."""
    counted: Tensor
    """Which answer tokens but the first come before the end. Shape: [B, N - 1]."""


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


def follow(model: Any, processor: Any, items: Sequence[Item], new_tokens: int) -> Followed:
    """The model's greedy answers, and its cache of the prompts."""
    inputs = prompts(processor, items).to(model.device)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    made: list[ForwardPasses] = []
    model.generate(
        **inputs, max_new_tokens=1, do_sample=False, custom_generate=partial(_read, made=made)
    )
    return Followed(made[0], ids, length, _before_the_end(model, ids[:, length:]))


def _read(model: Any, input_ids: Tensor, *, made: list[ForwardPasses], **kwargs: Any) -> Tensor:
    """A `custom_generate` that reads the prompt, and leaves its passes in `made`."""
    config = kwargs.pop("generation_config")
    for name in ("logits_processor", "stopping_criteria"):
        del kwargs[name]
    passes = ForwardPasses(model, kwargs)
    passes.prompt(input_ids, config)
    made.append(passes)
    return input_ids


def _before_the_end(model: Any, answers: Tensor) -> Tensor:
    """Which tokens but the first [B, N - 1] follow a token that does not end its answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return torch.ones_like(answers[:, 1:], dtype=torch.bool)
    ended = torch.isin(answers, torch.as_tensor(ends, device=answers.device))
    return ended.cumsum(-1)[:, :-1] == 0


def agreement(stack: Any, followed: Sequence[Followed], layers: tuple[int, ...]) -> Rows:
    """One pass of a draft over each batch of answers, behind the model's own prompts."""
    rows: Rows = []
    with with_policy(stack, Planned(plan_keeping(layers, stack.depth_layers))):
        for one in followed:
            new = one.ids.shape[1] - one.prompt - 1
            if not new:
                continue
            best = _behind(one, one.ids[:, :-1], new).argmax(-1)
            right = best == one.ids[:, -new:]
            pairs = zip(right.tolist(), one.counted.tolist(), strict=True)
            rows += [[r for r, on in zip(*pair, strict=True) if on] for pair in pairs]
    return [row for row in rows if row]


def _behind(one: Followed, ids: Tensor, new: int) -> Tensor:
    """Logits of `new` tokens behind the prompt, on a cache of their own. Shape: [B, new, V]."""
    passes = one.passes.fork(planes=False)
    passes.extend(new)
    return passes.run(ids, new)


def share(rows: Rows) -> float:
    """At how many of the tokens the draft is right, in [0, 1]."""
    return sum(map(sum, rows)) / sum(map(len, rows))


def costs_of(host: Any, stack: Any, one: Followed, stays: Sequence[int], rounds: int) -> Costs:
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

    drafts = {"shallow": stays[:1], "deep": stays}
    runs: dict[str, Callable[[], float]] = {
        name: partial(timed, 1, Planned(plan_keeping(layers, stack.depth_layers)))
        for name, layers in drafts.items()
    }
    runs |= {str(new): partial(timed, new, own) for new in range(1, MOST_TOKENS + 2)}
    taken = {name: median(times) for name, times in interleaved(runs, rounds=rounds).items()}
    step = taken["1"]
    more = max(len(stays) - 1, 1)
    layer = max(taken["deep"] - taken["shallow"], 0) / more / step
    verifying = {k: taken[str(k + 1)] / step for k in range(1, MOST_TOKENS + 1)}
    return Costs(taken["shallow"] / step, layer, verifying)
