"""What the gates do on the boards, and what happens when small ones are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attached, depth, trace
from trol.evaluation.measuring import right
from trol.evaluation.tasks import TASKS, Item, board_items, prompts
from trol.policies.mixer import TrolMixer

TAUS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds of a sparse curve; tokens whose gate is no larger leave after one visit."""

TRACED = 128
"""Questions whose gates are looked at."""


class Thinned(AbstractPolicy):
    """The mixer, but only a random share of tokens, layer by layer, makes the second visit."""

    name = "thinned"

    def __init__(self, mixer: TrolMixer, share: float, seed: int) -> None:
        super().__init__(scope=mixer.scope, training_scope=mixer.training_scope)
        self.mixer, self.share, self.seed = mixer, share, seed

    def bounds(self, layer: int) -> Bounds:
        return Bounds(1, self.mixer.bounds(layer).most)

    def again(self, visit: Visit) -> Answer:
        answer = self.mixer.again(visit)
        if visit.number == 0 or not isinstance(answer, Tensor):
            return answer
        source = torch.Generator().manual_seed(self.seed * 1000 + visit.layer)
        chosen = torch.rand(answer.shape, generator=source).to(answer.device) < self.share
        return torch.where(chosen, answer, 0.0)

    def settings(self) -> dict[str, Any]:
        return {"mixer": self.mixer.settings(), "share": self.share, "seed": self.seed}


def gate_spread(model: Any, processor: Any, *, seed: int = 0) -> dict[str, list[float]]:
    """Mean, 5th and 95th percentile of the gate over question tokens, layer by layer: [L] each."""
    gates = _gates(model, processor, board_items(TRACED, seed))
    return {
        "mean": gates.mean(1).tolist(),
        "low": gates.quantile(0.05, dim=1).tolist(),
        "high": gates.quantile(0.95, dim=1).tolist(),
    }


def sparse_curve(
    model: Any, processor: Any, *, questions: int = 540, seed: int = 0
) -> list[dict[str, float]]:
    """Accuracy against the share of second visits made: small gates left out, or as many random.

    Returns:
        `[{"tau", "share", "accuracy", "random"}]`; share of the second visits that tau = 0 makes.
    """
    mixer = attached(model)[1].depth_policy
    items = board_items(questions, seed)
    points: list[dict[str, float]] = []
    for tau in TAUS:
        sparse = TrolMixer(**{**mixer.settings(), "tau": tau})
        with depth(model, sparse):
            gates = _gates(model, processor, items[:TRACED])
            share = (gates > 0).float().mean().item()
            accuracy = _accuracy(model, processor, items)
        with depth(model, Thinned(mixer, share, seed)):
            at_random = _accuracy(model, processor, items)
        points.append({"tau": tau, "share": share, "accuracy": accuracy, "random": at_random})
    return points


def _accuracy(model: Any, processor: Any, items: Sequence[Item]) -> float:
    found = right(model, processor, items, TASKS["boards"])
    return sum(found) / len(found)


def _gates(model: Any, processor: Any, items: Sequence[Item]) -> Tensor:
    """What each layer gives the second visit of each question token. Shape: [L, tokens]."""
    inputs = prompts(processor, items).to(model.device)
    with trace(model) as seen, torch.inference_mode():
        model(**inputs)
    return seen.weights[:, 2][:, seen.real]
