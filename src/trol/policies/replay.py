"""Replaying a trace: what happened becomes what is to happen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, Answer, Bounds, Scope, Trace, Visit
from trol.depth.roles import expand_rows
from trol.errors import UsageError


class Replay(AbstractPolicy):
    """a_r = (sum_{j>r} w_j) / (sum_{j>=r} w_j): the answers that give a trace's weights again.

    Args:
        weights: w_r of every layer and token. Shape: [L, R + 1, B, T]; columns count from the
            first token that the cache ever saw, padding included.
        visits: how often each token visited each layer. Shape: [L, B, T].
        scope: the scope of the policy that was traced.

    Raises:
        UsageError: the stack has another number of layers, or more tokens come than were traced.
    """

    name = "replay"
    reads_start = True

    def __init__(
        self, weights: Tensor | list[Any], visits: Tensor | list[Any], *, scope: Scope = "all"
    ) -> None:
        super().__init__(scope=scope)
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        self.visits = torch.as_tensor(visits)
        # sum_{j>=r} w_j, from behind: 1 - w would round the smallest gates to 0.
        left = self.weights.flip(1).cumsum(dim=1).flip(1)
        later = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], dim=1)
        again = torch.where(left > 0, later / left, 0.0)
        self.answers = again.clamp(0, 1)  # Shape: [L, R + 1, B, T]

    @classmethod
    def of(cls, trace: Trace, *, scope: Scope = "all") -> Replay:
        """The replay of everything that `trace` saw.

        Raises:
            UsageError: the policy translated states (trained exit heads), which a trace holds not.
        """
        if trace.translated:
            raise UsageError(
                "the traced policy changes states at exits, and a trace holds visits and weights "
                "alone; attach the policy itself, or trace it with heads=False."
            )
        return cls(trace.weights, trace.visits, scope=scope)

    def check(self, layers: int) -> None:
        if len(self.visits) != layers:
            raise UsageError(
                f"the trace has {len(self.visits)} layers, this stack has {layers}; replay it on "
                "the model it was taken from."
            )

    def bounds(self, layer: int) -> Bounds:
        return Bounds(int(self.visits[layer].min()), int(self.visits[layer].max()))

    def again(self, visit: Visit) -> Answer:
        rows, tokens = visit.state.shape[:2]
        traced = self.answers.shape[-1]
        if visit.start + tokens > traced:
            raise UsageError(
                f"the trace covers {traced} tokens, this call ends at {visit.start + tokens}; "
                "trace the whole run."
            )
        here = self.answers[visit.layer, visit.number, :, visit.start : visit.start + tokens]
        return expand_rows(here.to(visit.state.device), rows)

    def settings(self) -> dict[str, Any]:
        return {
            "weights": self.weights.tolist(),
            "visits": self.visits.tolist(),
            "scope": self.scope,
        }
