"""Muon for many small matrices: those of one shape are orthogonalised together.

torch.optim.Muon does the same to one matrix after another, in bfloat16: measured on a CPU with 28
matrices of a 64-wide decoder, 95 ms a step against 7 ms here (LAB.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration X <- a X + (b X X^T + c (X X^T)^2) X (Jordan et al., 2024)."""

ITERATIONS = 5


class BatchedMuon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix as the step (Jordan et al., 2024).

        m <- beta m + (1 - beta) g      W <- W - lr sqrt(max(1, rows / columns)) NS(nesterov(m))

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
                    matrix.add_(direction, alpha=-rate)

    def _momentum(self, matrices: list[Tensor], beta: float) -> Tensor:
        """Nesterov's look ahead. Shape: [matrices, rows, columns]."""
        looks = []
        for matrix in matrices:
            state = self.state[matrix]
            gradient = matrix.grad
            assert gradient is not None
            kept = state.setdefault("momentum", torch.zeros_like(gradient))
            kept.lerp_(gradient, 1 - beta)
            looks.append(gradient.lerp(kept, beta))
        return torch.stack(looks)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix. Shape: [N, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
