"""TroL's mixer: each layer runs again on the question, weighted token by token by a tiny gate."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trol.depth import Answer, Bounds, Scope, Visit
from trol.depth.policy import check_number, check_share, check_whole, mixture
from trol.errors import UsageError, unknown
from trol.host.torch_internals import has_hooks, run_kernel
from trol.policies.base import DataclassPolicy, PolicyLinear, linear, warn_if_untrained

KERNEL = ("trol.policies.gate_kernel", "gated_mixture")
"""Computes `Gate` and `mixture` in one launch on CUDA devices."""

UNTRAINED = (
    "TrolMixer's gates were never trained: they start at random (initial_gate=None), and a "
    "pretrained model's answers break; TrolMixer() starts at 0.01 and changes little."
)

UNTRAINED_CONSTANT = (
    "TrolMixer's gates were never trained: a second visit costs as much as the first and counts "
    "for {:g} at each token in scope."
)

ATTACHED_GATE = 0.01
"""Where gates start that are attached to a host: one that was pretrained stays what it was."""

SHARING = ("per_layer", "shared")


def fits(state: Tensor) -> bool:
    """Whether the kernel can run on such states: it computes in float32."""
    return state.is_cuda and state.dtype != torch.float64


class Gate(PolicyLinear):
    """g(x) = 0.5 * tanh(w . x + b) + 0.5, one number per token; computed in float32."""

    def __init__(self, width: int, initial: float | None) -> None:
        super().__init__(width, 1)
        self.initial = initial
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.initial is None:
            nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        else:
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.bias, math.atanh(2 * self.initial - 1))
        self.mark_untrained()

    def forward(self, input: Tensor) -> Tensor:
        """The gate of each token. Shape: [B, T, D] -> [B, T]."""
        score = linear(input, self.weight, self.bias).squeeze(-1)
        return torch.sigmoid(2 * score)  # 0.5 tanh(s) + 0.5, in fewer operators


@dataclass(eq=False, repr=False)
class TrolMixer(DataclassPolicy):
    """Traversal of layers: out = (1 - g) L(x) + g L(L(x)) with g = 0.5 tanh(w . L(x) + b) + 0.5.

    TroL (https://arxiv.org/abs/2406.12246, section 3): our g is its w, our visit its propagation;
    its Table 8 is `passes`, its Table 9 is `scope`. The gate reads the first visit's output.

    Args:
        passes: visits of each layer, N >= 1; visit r + 1 is weighed by g(x_r). 1 is the plain
            model with unused gates.
        sharing: one gate for each layer (the paper's L * D parameters) or one for all (the
            released checkpoints).
        scope: which tokens are traversed in inference. A pass with labels has answers alone, so
            measure a loss with `all`.
        training_scope: which tokens are traversed in training (published: all).
        tau: the gate threshold: tokens whose gate is <= tau leave without another visit; 0 is
            exact, and a layer's output then moves by at most tau * |x_2 - x_1|. One for all layers,
            or one for each; None for a layer without second visits, whose gate is not computed.
        keep_first: tokens at the head of each sequence that visit every layer once.
        initial_gate: the gate's value before training. None is nn.Linear's own initialisation, as
            published, for models that are trained from nothing (`from_nothing`). Attached to a
            pretrained host it destroys it: untrained, over all tokens, SmolLM2-135M goes from
            perplexity 13.8 to 574 to 2,310 (three seeds), and stays at 13.8 with 0.01.

    Raises:
        UsageError: a setting is out of its range.
    """

    name = "trol_mixer"

    passes: int = 2
    _: KW_ONLY
    sharing: Literal["per_layer", "shared"] = "per_layer"
    scope: Scope = "question"
    training_scope: Scope = "all"
    tau: float | Sequence[float | None] = 0.0
    initial_gate: float | None = ATTACHED_GATE
    keep_first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("passes", self.passes, 1)
        if self.sharing not in SHARING:
            raise unknown("sharing", self.sharing, SHARING)
        start = self.initial_gate
        if start is not None:
            check_number("initial_gate", start)
            if not 0 < start < 1:
                raise UsageError(f"initial_gate is {start}, but must lie in (0, 1).")
        self.tau = _checked(self.tau)
        self._untrained = UNTRAINED if start is None else UNTRAINED_CONSTANT.format(start)

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
        """tau of layer `layer`; None for a layer without second visits."""
        tau: Any = self.tau
        return tau[layer] if isinstance(tau, tuple) else tau

    def bounds(self, layer: int) -> Bounds:
        tau = self.threshold(layer)
        if tau is None:
            return Bounds(1, 1)
        return Bounds(1 if tau else self.passes, self.passes)

    def again(self, visit: Visit) -> Answer:
        if visit.number == 0:
            return 1.0
        assert visit.gate is not None
        warn_if_untrained(visit, self._untrained)
        tau, gate = self.threshold(visit.layer), visit.gate(visit.state)
        return torch.where(gate > tau, gate, 0.0) if tau else gate

    def mix(self, visit: Visit, further: Tensor) -> Tensor:
        if type(self).again is not TrolMixer.again:  # a subclass that answers in its own way
            return super().mix(visit, further)
        gate, state = visit.gate, visit.state
        assert gate is not None
        warn_if_untrained(visit, self._untrained)
        if fits(state) and visit.context.fuses and type(gate) is Gate and not has_hooks(gate):
            out = run_kernel(*KERNEL, state, further, gate.weight, gate.bias)
            if out is not None:
                return out
        return mixture(state, further, gate(state))  # every gate is above a tau of 0


def from_nothing(settings: dict[str, Any]) -> dict[str, Any]:
    """Policy settings of a model that is trained from nothing: `{"policy": name, ...}`.

    A mixer's gates then start as published, unless the settings say how, and the result says so.
    """
    if settings.get("policy") != TrolMixer.name:
        return settings
    return {**settings, "initial_gate": settings.get("initial_gate")}


def _checked(tau: Any) -> float | tuple[float | None, ...]:
    """One threshold, or one for each layer; raises `UsageError` where one is outside [0, 1)."""
    if isinstance(tau, (int, float)) and not isinstance(tau, bool):
        check_share("tau", tau)
        return tau
    if isinstance(tau, str) or not isinstance(tau, Sequence) or not tau:
        raise UsageError(
            f"tau is {tau!r}; give a number in [0, 1), or a list with one (or None) for each layer."
        )
    for layer, one in enumerate(tau):
        if one is None:
            continue
        if not isinstance(one, (int, float)) or isinstance(one, bool):
            raise UsageError(f"tau of layer {layer} is {one!r}; give a number in [0, 1), or None.")
        check_share(f"tau of layer {layer}", one)
    return tuple(tau)
