"""Controllers: tiny networks that decide, token by token and layer by layer, what is skipped."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import initialization as init

from trol.depth import Answer, Bounds, Scope, Visit
from trol.depth.policy import check_number, check_whole
from trol.depth.roles import INPUT
from trol.errors import HostError, UsageError, unknown
from trol.host.flops import matrix_flops
from trol.policies.base import (
    DataclassPolicy,
    PolicyModule,
    SkippedKV,
    init_linear,
    linear,
    warn_if_untrained,
)

UNTRAINED = (
    "Controller's modules were never trained: with initial above 0.5 (the default) every token "
    "goes through every layer, with None some skip at random."
)

Input = Literal["hidden", "position", "embedding", "sum", "ones"]
"""What a controller can read."""

SHRINK = 8
"""How many times narrower each hidden layer is than the one before it."""

LONGEST_WAVE = 10_000
"""The longest wavelength of the position embedding. Unit: 2 pi tokens."""


class ControllerNet(PolicyModule):
    """Two logits of each token, to skip and to go through, and the choice; all in float32.

    The weights are parameters and not `nn.Linear`, so that whatever looks for a host's linear maps
    (LoRA, quantisation, FLOPs of a layer) does not take them for the host's.

    Args:
        width: D.
        hidden_layers: ReLU layers between, each `SHRINK` times narrower.
        initial: the probability of going through before training; None for nn.Linear's own
            initialisation.
    """

    def __init__(self, width: int, hidden_layers: int, initial: float | None) -> None:
        super().__init__()
        inner = [max(2, width // SHRINK**depth) for depth in range(1, hidden_layers + 1)]
        # Not in a ParameterList: transformers gives first values to what a module owns itself.
        for number, (wide, narrow) in enumerate(pairwise((width, *inner, 2))):
            self.register_parameter(f"weight_{number}", nn.Parameter(torch.empty(narrow, wide)))
            self.register_parameter(f"bias_{number}", nn.Parameter(torch.empty(narrow)))
        self.hidden_layers, self.initial = hidden_layers, initial
        self.reset_parameters()

    @property
    def maps(self) -> list[tuple[Tensor, Tensor]]:
        """Weight [out, in] and bias [out] of each linear map, from the input on."""
        get, count = self.get_parameter, 1 + self.hidden_layers
        return [(get(f"weight_{number}"), get(f"bias_{number}")) for number in range(count)]

    def reset_parameters(self) -> None:
        for weight, bias in self.maps:
            init_linear(weight, bias)
        if self.initial is not None:
            weight, bias = self.maps[-1]
            init.zeros_(weight)
            odds = math.log(self.initial / (1 - self.initial))
            init.copy_(bias, torch.tensor([0.0, odds]))
        self.mark_untrained()

    def forward(self, input: Tensor, scope: Tensor, temperature: float) -> Tensor:
        """1 where a token goes through. Shape: [B, T, D] -> [B, T].

        Drawn in training, the likelier choice otherwise. `scope` [B, T] says which answers count:
        forward hooks read it.
        """
        logits = self.logits(input)
        if not self.training:
            return (logits[..., 1] >= logits[..., 0]).float()
        return nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)[..., 1]

    def logits(self, input: Tensor) -> Tensor:
        """The logits of skipping and of going through. Shape: [B, T, D] -> [B, T, 2]."""
        state = linear(input, *self.maps[0])
        for weight, bias in self.maps[1:]:
            state = linear(nn.functional.relu(state), weight, bias)
        return state


@dataclass(eq=False, repr=False)
class Controller(DataclassPolicy):
    """a_0 = 1 where logit_go >= logit_skip, else 0, from a small network on each inner layer.

        training:   a_0 ~ Gumbel-softmax(logits / temperature), hard, straight through
        alpha:      loss = CE + alpha * e,                e = mean over all L layers of the
        target:     loss = CE + weight * (e - target)^2       share of tokens that go through

    Glavas et al. (https://arxiv.org/abs/2410.20022, experiment 2): the first and the last layer
    always run, and only answer tokens skip. Its token-agnostic control is `input="ones"`: all
    tokens look the same, so each layer learns one probability. One difference is meant: its code
    draws at evaluation too, this takes the likelier choice, so that answers are reproducible.

    Args:
        input: `hidden`, the state that enters the layer; `position`, sines and cosines of the
            token's place in its row; `embedding`, the state that entered layer 0; `sum`, these
            three summed and standardised; `ones`, nothing. No gradient goes back through it.
        hidden_layers: of each network, ReLU, each 8 times narrower; 0 for one linear map.
        temperature: of the Gumbel-softmax.
        alpha: what a layer visit costs; not with `target`.
        target: the share e to reach, (2 / L, 1]; None for no target.
        weight: what it costs to miss the target.
        keep_first: tokens at the head of each sequence that never skip.
        initial: the probability of going through before training, near 1 so that training starts
            near the full model; None for nn.Linear's own initialisation, as published.

    Raises:
        UsageError: a setting is out of its range, or both alpha and target are given.
    """

    name = "controller"
    decides = True

    input: Input = "hidden"
    _: KW_ONLY
    hidden_layers: int = 0
    temperature: float = 1.0
    alpha: float = 0.0
    target: float | None = None
    weight: float = 10.0
    initial: float | None = 0.95
    scope: Scope = "answer"
    training_scope: Scope = "answer"
    skipped_kv: SkippedKV = "project"
    keep_first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input not in get_args(Input):
            raise unknown("input", self.input, get_args(Input))
        for name in ("temperature", "alpha", "target", "weight", "initial"):
            if (value := getattr(self, name)) is not None or name not in ("target", "initial"):
                check_number(name, value)
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}, but must be above 0.")
        if self.initial is not None and not 0 < self.initial < 1:
            raise UsageError(f"initial is {self.initial}, but must lie in (0, 1).")
        check_whole("hidden_layers", self.hidden_layers)
        for name in ("alpha", "weight"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.target is not None and not 0 < self.target <= 1:
            raise UsageError(f"target is {self.target}, but must lie in (0, 1].")
        if self.target is not None and self.alpha:
            raise UsageError(
                f"alpha is {self.alpha} and target is {self.target}, which contradict each other; "
                "give one: alpha makes visits dear, target names how many are wanted."
            )
        self.reads_start = self.input in ("position", "sum")
        self.reads_input = self.input in ("embedding", "sum")
        self._last: int | None = None  # layer of the stack that `check` saw; `gate` runs after it

    def check(self, layers: int) -> None:
        if layers < 3:
            raise UsageError(
                "a controller decides about the layers between the first and the last, and this "
                f"stack has {layers}; take a model of 3 layers or more."
            )
        if self.target is not None and self.target < 2 / layers:
            raise UsageError(
                f"target is {self.target}, but the first and the last of {layers} layers always "
                f"run; give {2 / layers:.3g} or more."
            )
        self._last = layers - 1

    def gate(self, layer: int, width: int) -> nn.Module | None:
        inner = 0 < layer != self._last
        return ControllerNet(width, self.hidden_layers, self.initial) if inner else None

    def bounds(self, layer: int) -> Bounds:
        return Bounds(0 if layer else 1, 1)

    def again(self, visit: Visit) -> Answer:
        gate = visit.gate
        if gate is None:
            return 1.0
        warn_if_untrained(visit, UNTRAINED)
        scope = visit.context.scope(visit.state)
        goes: Tensor = gate(self._input(visit), scope, self.temperature)
        if gate.training:
            learns = any(p.requires_grad for p in gate.parameters())
            visit.context.notes[self.name, visit.layer] = (goes * scope).sum(), scope.sum(), learns
        return goes

    def look_flops(self, visit: Visit) -> int:
        return 0 if visit.gate is None else matrix_flops(visit.gate)

    def penalty(self, notes: Mapping[Any, Any]) -> Tensor | None:
        inner = [note for key, note in notes.items() if key[:1] == (self.name,)]
        if not inner or not (self.alpha or self.target is not None):
            return None
        shares = torch.stack([goes / count.clamp(min=1) for goes, count, _ in inner])
        if torch.is_grad_enabled() and inner[0][2] and not shares.requires_grad:
            raise HostError(
                "re-entrant gradient checkpointing hides from the loss what the controllers "
                'decide; turn it on with {"use_reentrant": False}.'
            )
        executed = (shares.sum() + 2) / (len(inner) + 2)  # the first and the last layer run
        if self.target is None:
            return self.alpha * executed
        return self.weight * (executed - self.target) ** 2

    def _input(self, visit: Visit) -> Tensor:
        """What the network reads. Shape: [B, T, D]."""
        state, context = visit.state.detach(), visit.context
        if self.input == "hidden":
            return state
        if self.input == "ones":
            return torch.ones_like(state)
        if self.input == "embedding":
            return context.notes[INPUT].detach()
        places = sinusoids(context.positions(state), state.shape[-1])
        if self.input == "position":
            return places.expand(state.shape)
        return nn.functional.layer_norm(
            state.float() + places + context.notes[INPUT].detach().float(), state.shape[-1:]
        )


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """sin(p / 10000^(2i/D)), then cos of the same. Shape: [B, T] -> FloatTensor [B, T, D]."""
    half = (width + 1) // 2
    steps = torch.arange(half, device=positions.device) / half
    angles = positions[..., None] * LONGEST_WAVE**-steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]
