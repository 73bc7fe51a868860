"""What a stage learns with: AdamW, Muon for matrices, both at once, and the schedule of rates."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from trol.host import sharding
from trol.training.recipe import Stage

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration X <- a X + (b X X^T + c (X X^T)^2) X (Jordan et al., 2024)."""

MUON_ITERATIONS = 5


class BatchedMuon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix as the step (Jordan et al., 2024).

        m <- beta m + (1 - beta) g      W <- W - lr sqrt(max(1, rows / columns)) NS(nesterov(m))

    torch.optim.Muon takes one matrix after another, in bfloat16; here those of one shape are
    orthogonalised together: on a CPU with 28 matrices of a 64-wide decoder, 7 ms a step in place
    of 95 (LAB.md).

    Args:
        params: matrices [rows, columns]; all of one parameter group share `lr`.
        lr: the learning rate.
        momentum: beta.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), matrices in by_shape.items():
                directions = _orthogonal(self._momentum(matrices, group["momentum"]))
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(sharding.cut_as(direction, matrix), alpha=-rate)

    def _momentum(self, matrices: list[Tensor], beta: float) -> Tensor:
        """Nesterov's look ahead, of sharded matrices too. Shape: [matrices, rows, columns]."""
        ahead = []
        for matrix in matrices:
            gradient = matrix.grad
            assert gradient is not None
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - beta)
            ahead.append(sharding.whole(gradient.lerp(momentum, beta)))
        return torch.stack(ahead)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix. Shape: [N, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = MUON_COEFFICIENTS
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class ChainedOptimizer(torch.optim.Optimizer):
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
    matrices, mixers, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = ".layers." in name or ".linear_" in name  # of the projector
        if ".depth." in name:
            mixers.append(parameter)
        elif stage.muon and inner and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "lr": stage.learning_rate}]
    if mixers:
        groups.append({"params": mixers, "lr": stage.mixer_learning_rate})
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    return ChainedOptimizer([BatchedMuon(matrices, stage.muon), adamw]) if matrices else adamw


def schedule(optimiser: torch.optim.Optimizer, stage: Stage) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then as `stage.schedule` says, in N = `stage.steps`.

    linear:  flat, then linear to the final rate over the last `decay` of the steps
    cosine:  final + (highest - final) (1 + cos(pi t)) / 2,   t from 0 to 1 after the warm-up

    The rate of step 0 is that of warm-up step 1, where transformers' schedules begin with 0.
    """
    least = stage.final_rate / stage.learning_rate if stage.learning_rate else 0.0

    def share(step: int) -> float:
        if stage.schedule == "cosine":
            done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
            falling = (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2
        else:
            falling = (stage.steps - step) / max(1.0, stage.decay * stage.steps)
            falling = max(0.0, min(1.0, falling))
        rising = (step + 1) / max(1, stage.warmup_steps)
        return min(1.0, rising, least + (1 - least) * falling)

    return LambdaLR(optimiser, share)


def shard_states(optimiser: Any) -> None:
    """Makes states that were read as this process's shares as sharded as their parameters."""
    inner = getattr(optimiser, "optimizer", optimiser)  # inside accelerate's
    for part in getattr(inner, "parts", [inner]):
        for parameter, states in part.state.items():
            for name, value in states.items():
                if value.ndim:  # counts of steps are whole
                    states[name] = sharding.shared_as(value, parameter)
