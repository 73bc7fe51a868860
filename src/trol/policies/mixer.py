"""TroL's mixer: every layer runs again on the question, mixed token by token by a tiny gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trol.depth import AbstractPolicy, Answer, Bounds, Scope, Visit
from trol.depth.policy import check_share, mixture
from trol.errors import UsageError, unknown
from trol.host.torch_internals import has_hooks, run_kernel
from trol.policies.parameters import OwnLinear, tell_untrained

KERNEL = ("trol.policies.gate_kernel", "gated_mixture")
"""What does on CUDA devices in one launch what `Gate` and `mixture` do."""

UNTRAINED = (
    "TrolMixer's gates were never trained: they mix second visits in at random, and a pretrained "
    "model's answers break; TrolMixer(initial_gate=0.01) changes little."
)

SHARING = ("per_layer", "shared")


def fits(state: Tensor) -> bool:
    """Whether the kernel is for such states: it computes in float32."""
    return state.is_cuda and state.dtype != torch.float64


class Gate(OwnLinear):
    """g(x) = 0.5 * tanh(w . x + b) + 0.5, one number per token; computed in float32."""

    def __init__(self, width: int, initial: float | None) -> None:
        super().__init__(width, 1)
        self.initial = initial
        self.start_over()

    def start_over(self) -> None:
        """Sets the parameters to their first values."""
        if self.initial is None:
            self.reset_parameters()
            return self.begin()
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, math.atanh(2 * self.initial - 1))

    def forward(self, input: Tensor) -> Tensor:
        """The gate of each token. Shape: [B, T, D] -> [B, T]."""
        kind = input.device.type
        rounds = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if rounds else nullcontext():
            weight, bias = self.weight.float(), self.bias.float()
            score = nn.functional.linear(input.float(), weight, bias).squeeze(-1)
            return torch.sigmoid(2 * score)  # 0.5 tanh(s) + 0.5, in fewer operators


class TrolMixer(AbstractPolicy):
    """Traversal of layers: out = (1 - g) L(x) + g L(L(x)) with g = 0.5 tanh(w . L(x) + b) + 0.5.

    TroL (https://arxiv.org/abs/2406.12246, section 3): our g is its w, our visit its propagation;
    its Table 8 is `passes`, its Table 9 is `scope`. The gate reads the first visit's output.

    Args:
        passes: visits of each layer, N >= 1; visit r + 1 is weighed by g(x_r). 1 is the plain
            model with unused gates.
        sharing: one gate for each layer (the paper's L * D parameters) or one for all (the
            released checkpoints).
        scope: who is traversed in inference.
        training_scope: who is traversed in training (published: all tokens).
        tau: tokens whose gate is <= tau leave without another visit; 0 is exact, and a layer's
            output then moves by at most tau * |x_2 - x_1|. One for all layers, or one for each;
            None for a layer that nobody visits again, whose gate is not even computed.
        initial_gate: the gate's value before training, 0.001 for nearly no effect; None for
            nn.Linear's own initialisation, as published.
    """

    name = "trol_mixer"

    def __init__(
        self,
        passes: int = 2,
        *,
        sharing: Literal["per_layer", "shared"] = "per_layer",
        scope: Scope = "question",
        training_scope: Scope = "all",
        tau: float | Sequence[float | None] = 0.0,
        initial_gate: float | None = None,
    ) -> None:
        super().__init__(scope=scope, training_scope=training_scope)
        if not isinstance(passes, int) or passes < 1:
            raise UsageError(
                f"passes is {passes!r}, but a layer must be visited at least once; give a whole "
                "number from 1 on."
            )
        if sharing not in SHARING:
            raise unknown("sharing", sharing, SHARING)
        if initial_gate is not None and not 0 < initial_gate < 1:
            raise UsageError(f"initial_gate is {initial_gate}, but must lie in (0, 1).")
        self.passes, self.sharing, self.tau = passes, sharing, _checked(tau)
        self.initial_gate = initial_gate

    @property
    def tied(self) -> bool:
        return self.sharing == "shared"

    def gate(self, layer: int, width: int) -> nn.Module:
        return Gate(width, self.initial_gate)

    def learns(self, layer: int) -> bool:
        return self.bounds(layer).most > 1

    def check(self, layers: int) -> None:
        if isinstance(self.tau, tuple) and len(self.tau) != layers:
            raise UsageError(
                f"tau is a list of {len(self.tau)}, but the stack has {layers} layers; give one "
                "for each layer, or one number for all."
            )

    def threshold(self, layer: int) -> float | None:
        """tau of layer `layer`; None where nobody goes again."""
        return self.tau[layer] if isinstance(self.tau, tuple) else self.tau

    def bounds(self, layer: int) -> Bounds:
        tau = self.threshold(layer)
        if tau is None:
            return Bounds(1, 1)
        return Bounds(1 if tau else self.passes, self.passes)

    def again(self, visit: Visit) -> Answer:
        if visit.number == 0:
            return 1.0
        assert visit.gate is not None
        tell_untrained(visit, UNTRAINED)
        tau, gate = self.threshold(visit.layer), visit.gate(visit.state)
        return torch.where(gate > tau, gate, 0.0) if tau else gate

    def mix(self, visit: Visit, further: Tensor) -> Tensor:
        if type(self).again is not TrolMixer.again:  # who answers otherwise is asked
            return super().mix(visit, further)
        gate, state = visit.gate, visit.state
        assert gate is not None
        tell_untrained(visit, UNTRAINED)
        if fits(state) and visit.context.fuses and type(gate) is Gate and not has_hooks(gate):
            out = run_kernel(*KERNEL, state, further, gate.weight, gate.bias)
            if out is not None:
                return out
        return mixture(state, further, gate(state))  # every gate is above a tau of 0

    def settings(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "sharing": self.sharing,
            "scope": self.scope,
            "training_scope": self.training_scope,
            "tau": list(self.tau) if isinstance(self.tau, tuple) else self.tau,
            "initial_gate": self.initial_gate,
        }


def _checked(tau: float | Sequence[float | None]) -> float | tuple[float | None, ...]:
    """One threshold, or one for each layer; raises `UsageError` where one is outside [0, 1)."""
    if isinstance(tau, (int, float)):
        check_share("tau", tau)
        return tau
    if isinstance(tau, str) or not isinstance(tau, Sequence) or not tau:
        raise UsageError(
            f"tau is {tau!r}; give a number in [0, 1), or a list with one (or None) for each layer."
        )
    for layer, one in enumerate(tau):
        if one is not None and not isinstance(one, (int, float)):
            raise UsageError(f"tau of layer {layer} is {one!r}; give a number in [0, 1), or None.")
        if one is not None:
            check_share(f"tau of layer {layer}", one)
    return tuple(tau)
