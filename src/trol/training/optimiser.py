"""The optimiser of a stage: AdamW, and Muon for the inner matrices if wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from trol.training.muon import BatchedMuon
from trol.training.recipe import Stage


class Together(torch.optim.Optimizer):
    """Several optimisers that step as one; their parameter groups are the sum of theirs."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        # The very dicts of the parts, so that a schedule which sets a group's rate reaches them.
        self.param_groups = groups

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each part."""
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of each part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of each part."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def optimiser(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW for all that learns, or Muon for decoder matrices and AdamW for the rest."""
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in learning.items() if stage.muon and _is_inner_matrix(n, p)}
    mixers = [p for n, p in learning.items() if ".depth." in n]
    rest = [p for n, p in learning.items() if n not in matrices and ".depth." not in n]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": stage.learning_rate}]
    if mixers:
        groups.append({"params": mixers, "lr": stage.mixer_learning_rate})
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    if not matrices:
        return adamw
    muon = BatchedMuon(matrices.values(), stage.muon)
    return Together([muon, adamw])


def schedule(optimiser: torch.optim.Optimizer, stage: Stage) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then as `stage.schedule` says, in N = `stage.steps`.

    linear:  flat, then linear to the final rate over the last `decay` of the steps
    cosine:  final + (highest - final) (1 + cos(pi t)) / 2,   t from 0 to 1 after the warm-up
    """
    least = stage.final_rate / stage.learning_rate if stage.learning_rate else 0.0
    falling = {"linear": _linear, "cosine": _cosine}[stage.schedule]

    def share(step: int) -> float:
        rising = (step + 1) / max(1, stage.warmup_steps)
        return min(1.0, rising, least + (1 - least) * falling(step, stage))

    return LambdaLR(optimiser, share)


def _linear(step: int, stage: Stage) -> float:
    return max(0.0, min(1.0, (stage.steps - step) / max(1.0, stage.decay * stage.steps)))


def _cosine(step: int, stage: Stage) -> float:
    after = stage.steps - stage.warmup_steps
    done = min(1.0, max(0.0, (step - stage.warmup_steps) / max(1, after)))
    return (1 + math.cos(math.pi * done)) / 2


def _is_inner_matrix(name: str, parameter: Tensor) -> bool:
    inner = ".layers." in name or ".linear_" in name  # of the projector
    return parameter.ndim == 2 and inner and ".depth." not in name
