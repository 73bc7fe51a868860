"""What reading a prompt takes under several policies, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trol.depth import AbstractPolicy, depth
from trol.evaluation.tasks import Item, fitted, prompts
from trol.evaluation.timing import interleaved, ratio_and_spread, time_generate

TOGETHER = (1, 32)
"""Questions that are read at once."""

ROUNDS = 9

NEW_TOKENS = 2
"""Tokens of an answer: the fewest that are timed."""


@dataclass(frozen=True)
class Prefill:
    """From the call to the first new token; ratios are medians over rounds."""

    questions: int
    """Read at once."""
    tokens: int
    """Of the longest of these questions."""
    milliseconds: dict[str, float]
    """Policy -> median."""
    ratio: dict[str, float]
    """Policy -> time, of the first policy's."""
    spread: dict[str, float]
    """Policy -> half the interquartile range of that ratio."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def prefills(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policies: Mapping[str, AbstractPolicy | str],
    *,
    rounds: int = ROUNDS,
) -> tuple[Prefill, ...]:
    """Times the first questions, alone and together, under each policy; the first is the measure.

    Args:
        model: the model.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions; as many are read together as there are, 32 at most.
        policies: name -> policy.
        rounds: how often each is timed, in turn.
    """
    found = []
    for count in sorted({min(count, len(items)) for count in TOGETHER}):
        some = [fitted(model, processor, item, NEW_TOKENS) for item in items[:count]]
        inputs = prompts(processor, some).to(model.device)
        runs = {name: _run(model, inputs, policy) for name, policy in policies.items()}
        with torch.inference_mode():
            times = interleaved(runs, rounds=rounds, warmups=2)
        first = next(iter(times.values()))
        ratios = {name: ratio_and_spread(first, each) for name, each in times.items()}
        found.append(
            Prefill(
                count,
                inputs["input_ids"].shape[1],
                {name: statistics.median(each) for name, each in times.items()},
                {name: ratio for name, (ratio, _) in ratios.items()},
                {name: spread for name, (_, spread) in ratios.items()},
            )
        )
    return tuple(found)


def _run(model: Any, inputs: Any, policy: AbstractPolicy | str) -> Any:
    def run() -> float:
        with depth(model, policy):
            return time_generate(model, inputs, NEW_TOKENS).prefill

    return run
