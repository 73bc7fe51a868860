"""What answers cost: layer visits and FLOPs of the first questions, and times of the first alone.

A trace reads every visit back from the device, so only the first batches have one.
"""

import statistics
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trol.depth import trace
from trol.evaluation.items import positions_of
from trol.evaluation.timing import Timing, time_generate

TRACED = 64
"""Questions whose batches are traced, rounded up to whole batches."""

TIMED_TOKENS = 8
"""New tokens of the answer that is timed."""

ROUNDS = 3
"""How often it is timed, after once unmeasured."""


class DepthColumns:
    """Adds up what traced batches took, and times one question.

    Args:
        model: the model that answers, attached or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.questions = self.tokens = self.visits = 0
        self.flops: int | None = 0
        self.timings: list[Timing] = []

    @contextmanager
    def batch(self, questions: int) -> Generator[None]:
        """Spans the passes that answer or read a batch of `questions`, all of one batch size."""
        if self.questions >= TRACED or not questions:
            yield
            return
        with trace(self.model) as seen:
            yield
        cost = seen.cost
        self.questions += questions
        self.tokens += int(seen.real.sum())
        self.visits += cost.layer_visits
        self.flops = None if None in (self.flops, cost.flops) else self.flops + cost.flops  # type: ignore[operator]

    @torch.inference_mode()
    def time(self, inputs: Mapping[str, Tensor]) -> None:
        """Times greedy answers to one question, its ids [1, T], unless one was timed before."""
        most, length = positions_of(self.model), inputs["input_ids"].shape[1]
        tokens = min(TIMED_TOKENS, TIMED_TOKENS if most is None else most - length)
        if not self.timings and tokens > 1:
            runs = [time_generate(self.model, inputs, tokens) for _ in range(ROUNDS + 1)]
            self.timings = runs[1:]

    def json(self) -> dict[str, Any]:
        """The columns; None where nothing was seen, or is not known.

        Returns:
            `{"layer_visits_per_token", "flops_per_question", "prefill_ms", "decode_ms",
            "questions", "tokens"}`: visits of all layers together by a token, prompts and answers;
            the last two are how many questions, and tokens in all, the first two are of.
        """
        flops = None if self.flops is None else self.flops / max(1, self.questions)
        return {
            "layer_visits_per_token": self.visits / self.tokens if self.tokens else None,
            "flops_per_question": flops if self.questions else None,
            "prefill_ms": _median([one.prefill for one in self.timings]),
            "decode_ms": _median([one.mean_decode for one in self.timings]),
            "questions": self.questions,
            "tokens": self.tokens,
        }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
