"""Timing side by side: answers, passes and training steps, prompts by policy, and drafts.

Runs are interleaved in rounds; results are medians and half the interquartile range of ratios.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from trol.depth import AbstractPolicy, Plan, depth, trace
from trol.depth.attachment import decoding
from trol.depth.call import Decoding
from trol.depth.policy import Plain
from trol.depth.trace import Trace
from trol.errors import UsageError
from trol.evaluation.answers import greedy
from trol.evaluation.items import Item, batches, fitted_prompts, prompts
from trol.host.generation import SLICES_LOGITS
from trol.host.names import CACHE
from trol.speculation import speculate

Measured = TypeVar("Measured")

READ_AT_ONCE = (1, 32)
"""Questions that are read at once where reading prompts is timed."""

PREFILL_ROUNDS = 9

PREFILL_TOKENS = 2
"""Tokens of an answer whose prompt is timed: the fewest that `time_generate` takes."""


@dataclass(frozen=True)
class Timing:
    """One run of `generate`. Unit: milliseconds."""

    prefill: float
    """From the call to the first new token."""
    decode: float
    """Median time of one further token."""
    mean_decode: float
    """Mean time of one further token: what counts where tokens differ in depth."""
    peak_bytes: int | None = None
    """The most memory held on a GPU meanwhile, the model's own included; None without one."""


class _Clock(StoppingCriteria):
    """Notes the time of each new token; never stops the run."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(now(input_ids.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_generate(model: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Timing:
    """Times one greedy `generate` of `new_tokens`, two or more; `inputs` hold ids [B, T]."""
    clock, device = _Clock(), inputs["input_ids"].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = now(device)
    model.generate(
        **{"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs},
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    steps = [later - sooner for sooner, later in zip(clock.times, clock.times[1:], strict=False)]
    return Timing(
        1000 * (clock.times[0] - began),
        1000 * statistics.median(steps),
        1000 * statistics.fmean(steps),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def forced_traces(
    model: Any, inputs: Sequence[Mapping[str, torch.Tensor]], new_tokens: int
) -> Iterator[Trace]:
    """Traces of answers of exactly `new_tokens` tokens to one batch of inputs after the other."""
    for each in inputs:
        with trace(model) as seen, torch.inference_mode():
            time_generate(model, each, new_tokens)
        yield seen


@torch.no_grad()
def generated(
    models: Mapping[str, Any], inputs: Mapping[str, torch.Tensor], new_tokens: int, *, rounds: int
) -> dict[str, list[Timing]]:
    """Times greedy `generate` of several models in turn; `inputs` as in `time_generate`."""
    runs = {
        name: lambda model=model: time_generate(model, inputs, new_tokens)
        for name, model in models.items()
    }
    return interleaved(runs, rounds=rounds)


def time_forward(model: Any, ids: torch.Tensor, cache: Any = None, *, head: bool = False) -> float:
    """Milliseconds of one pass of the decoder over ids [B, T] that fills a cache.

    `head`: of the whole model instead, which reads the last logits alone, so that the visits of
    the last layer that no logit depends on are left out.
    """
    run, logits = (model, {SLICES_LOGITS: 1}) if head else (model.get_decoder(), {})
    began = now(ids.device)
    run(ids, **{CACHE: cache}, use_cache=True, **logits)
    return 1000 * (now(ids.device) - began)


def time_step(model: Any, batch: Mapping[str, torch.Tensor]) -> float:
    """Milliseconds of one loss and its gradients, without the optimiser's step."""
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device
    began = now(device)
    model(**batch, use_cache=False).loss.backward()
    return 1000 * (now(device) - began)


def interleaved(
    runs: Mapping[str, Callable[[], Measured]], *, rounds: int, warmups: int = 1
) -> dict[str, list[Measured]]:
    """Results of all runs, in turn, so that a slow moment of the machine hits all."""
    for _ in range(warmups):
        for run in runs.values():
            run()
    results: dict[str, list[Measured]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    for number in range(rounds):
        turn = number % len(names)  # the first and the last run change from round to round
        for name in names[turn:] + names[:turn]:
            results[name].append(runs[name]())
    return results


def ratio_and_spread(baseline: list[float], measured: list[float]) -> tuple[float, float]:
    """Median of the rounds' ratios, and half their interquartile range."""
    ratios = [m / b for b, m in zip(baseline, measured, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return statistics.median(ratios), (high - low) / 2


@dataclass(frozen=True)
class Prefill:
    """Times from the call to the first new token; ratios are medians over rounds."""

    questions: int
    """Read at once."""
    tokens: int
    """Length of the longest of these questions."""
    milliseconds: dict[str, float]
    """Policy -> median."""
    ratio: dict[str, float]
    """Policy -> time, as a multiple of the first policy's."""
    spread: dict[str, float]
    """Policy -> half the interquartile range of that ratio."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def time_prefills(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policies: Mapping[str, AbstractPolicy | str],
    *,
    rounds: int = PREFILL_ROUNDS,
) -> tuple[Prefill, ...]:
    """Times the first question alone, and the first 32 at once, under each policy in turn.

    Args:
        model: the model.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions; as many are read at once as there are, 32 at most.
        policies: name -> policy; ratios are to the first one.
        rounds: how often each is timed, in turn.
    """
    results = []
    for count in sorted({min(count, len(items)) for count in READ_AT_ONCE}):
        inputs = fitted_prompts(model, processor, items[:count], PREFILL_TOKENS)
        runs = {name: partial(_prefill, model, inputs, one) for name, one in policies.items()}
        with torch.inference_mode():
            times = interleaved(runs, rounds=rounds, warmups=2)
        first = next(iter(times.values()))
        ratios = {name: ratio_and_spread(first, each) for name, each in times.items()}
        results.append(
            Prefill(
                count,
                inputs["input_ids"].shape[1],
                {name: statistics.median(each) for name, each in times.items()},
                {name: ratio for name, (ratio, _) in ratios.items()},
                {name: spread for name, (_, spread) in ratios.items()},
            )
        )
    return tuple(results)


def _prefill(model: Any, inputs: Any, policy: AbstractPolicy | str) -> float:
    with depth(model, policy):
        return time_generate(model, inputs, PREFILL_TOKENS).prefill


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
    """The measured gain of a draft: greedy answers to all items, with it and without, in turn.

    `batch` items are answered at once.

    Returns:
        `{"acceptance", "tokens_per_round", "tokens_per_second": {"plain", "speculative"}, "ratio",
        "spread", "identical"}`; ratio is the median over rounds of plain / speculative seconds.

    Raises:
        UsageError: the plan does not fit, `tokens` < 1, or no items.
    """
    if not items:
        raise UsageError("speed is measured on prompts, but got none; give at least one item.")
    inputs = [prompts(processor, some).to(model.device) for some in batches(items, batch)]

    def timed(loop: Decoding | None) -> tuple[list[torch.Tensor], float]:
        """New ids [B, N] of each batch, and the seconds; `loop` in place of what is in force."""
        began = time.perf_counter()
        with nullcontext() if loop is None else decoding(model, loop, Plain()):
            new = [greedy(model, each, new_tokens) for each in inputs]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return new, time.perf_counter() - began

    with speculate(model, plan, tokens=tokens) as stats:
        # Both run attached, so that what is compared is the drafts alone.
        runs = {
            "plain": partial(timed, lambda _host, kwargs: kwargs),
            "speculative": partial(timed, None),
        }
        results = interleaved(runs, rounds=rounds)
    times = {name: [seconds for _, seconds in each] for name, each in results.items()}
    ratio, spread = ratio_and_spread(times["speculative"], times["plain"])
    plain, drafted = (results[name][-1][0] for name in ("plain", "speculative"))
    padding = model.generation_config.pad_token_id
    count = sum(int((new != (-1 if padding is None else padding)).sum()) for new in plain)
    return {
        "acceptance": stats.acceptance,
        "tokens_per_round": stats.tokens_per_round,
        "tokens_per_second": {
            name: count / statistics.median(each) for name, each in times.items()
        },
        "ratio": ratio,
        "spread": spread,
        "identical": all(map(torch.equal, plain, drafted)),
    }
