"""Timing two things side by side: interleaved rounds, medians, and how much they scatter."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from trol.host.generation import SLICES_LOGITS
from trol.host.names import CACHE

Measured = TypeVar("Measured")


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
    """Notes when each new token was there; never stops the run."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(now(input_ids.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds on a clock that starts anywhere, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_generate(model: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Timing:
    """Times one greedy `generate` of at least two new tokens; `inputs` hold ids [B, T] at least."""
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
    """Milliseconds of one pass over ids [B, T] that fills a cache, of the decoder alone.

    `head`: of the whole model, which then reads the last logits, and need not make some visits.
    """
    run, asked = (model, {SLICES_LOGITS: 1}) if head else (model.get_decoder(), {})
    began = now(ids.device)
    run(ids, **{CACHE: cache}, use_cache=True, **asked)
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
    """Runs everything in turn, `rounds` times, so that a slow moment of the machine hits all."""
    for _ in range(warmups):
        for run in runs.values():
            run()
    found: dict[str, list[Measured]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    for number in range(rounds):
        turn = number % len(names)  # whoever goes first, or last, changes from round to round
        for name in names[turn:] + names[:turn]:
            found[name].append(runs[name]())
    return found


def ratio_and_spread(baseline: list[float], measured: list[float]) -> tuple[float, float]:
    """Median of the rounds' ratios, and half their interquartile range."""
    ratios = [m / b for b, m in zip(baseline, measured, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return statistics.median(ratios), (high - low) / 2
