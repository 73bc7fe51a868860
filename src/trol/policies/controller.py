"""Controllers: tiny modules that decide, token by token and layer by layer, who goes through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from trol.depth import AbstractPolicy, Answer, Bounds, Scope, Visit
from trol.depth.roles import INPUT
from trol.errors import HostError, UsageError, unknown
from trol.host.flops import matrix_flops
from trol.policies.parameters import Learnt, tell_untrained

UNTRAINED = (
    "Controller's modules were never trained: with initial above 0.5 (the default) every token "
    "goes through every layer, with None some skip at random."
)

INPUTS = ("hidden", "position", "embedding", "sum", "ones")
"""What a controller can look at."""

SHRINK = 8
"""How many times narrower each hidden layer is than the one before it."""

LONGEST_WAVE = 10_000
"""Of the position embedding, in 2 pi tokens."""


class Decider(Learnt):
    """Two logits of each token, to skip and to go through, and the choice; all in float32.

    The weights are parameters and no `nn.Linear`, so that nothing that looks for linear maps in
    a host (LoRA, quantisation, FLOPs of a layer) takes them for the host's.

    Args:
        width: D.
        hidden_layers: ReLU layers between, each `SHRINK` times narrower.
        initial: the probability of going through before training; None for nn.Linear's own
            initialisation.
    """

    def __init__(self, width: int, hidden_layers: int, initial: float | None) -> None:
        super().__init__()
        inner = [max(2, width // SHRINK**depth) for depth in range(1, hidden_layers + 1)]
        # One by one, not in a list: transformers gives first values to what a module owns.
        for number, (wide, narrow) in enumerate(pairwise((width, *inner, 2))):
            self.register_parameter(f"weight_{number}", nn.Parameter(torch.empty(narrow, wide)))
            self.register_parameter(f"bias_{number}", nn.Parameter(torch.empty(narrow)))
        self.maps, self.initial = 1 + hidden_layers, initial
        self.start_over()

    @property
    def weights(self) -> list[Tensor]:
        """Shape: [out, in] each."""
        return [self.get_parameter(f"weight_{number}") for number in range(self.maps)]

    @property
    def biases(self) -> list[Tensor]:
        """Shape: [out] each."""
        return [self.get_parameter(f"bias_{number}") for number in range(self.maps)]

    def start_over(self) -> None:
        """Sets the parameters to their first values."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            start_linear(weight, bias)
        if self.initial is not None:
            init.zeros_(self.weights[-1])
            odds = math.log(self.initial / (1 - self.initial))
            init.copy_(self.biases[-1], torch.tensor([0.0, odds]))
        self.begin()

    def forward(self, input: Tensor, scope: Tensor, temperature: float) -> Tensor:
        """1 where a token goes through. Shape: [B, T, D] -> [B, T].

        Drawn in training, the likelier one otherwise. `scope` [B, T] says which answers count;
        it is here for those who watch this module.
        """
        del scope
        with torch.autocast(input.device.type, enabled=False):
            logits = self.logits(input.float())
            if not self.training:
                return (logits[..., 1] >= logits[..., 0]).float()
            drawn = nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)
            return drawn[..., 1]

    def logits(self, input: Tensor) -> Tensor:
        """Of skipping and of going through. Shape: [B, T, D] -> [B, T, 2]."""
        state = input
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            state = nn.functional.relu(state) if number else state
            state = nn.functional.linear(state, weight.float(), bias.float())
        return state


class Controller(AbstractPolicy):
    """a_0 = 1 where logit_go >= logit_skip, else 0, from a small module on each inner layer.

        training:   a_0 ~ Gumbel-softmax(logits / temperature), hard, straight through
        alpha:      loss = CE + alpha * e,                e = mean over all L layers of the
        target:     loss = CE + weight * (e - target)^2       share of tokens that go through

    Glavas et al. (https://arxiv.org/abs/2410.20022, experiment 2): the first and the last layer
    always run, and only answer tokens skip. Its token-agnostic control is `input="ones"`: all
    tokens look the same, so each layer learns one probability. One difference is meant: its code
    draws at evaluation too, this takes the likelier choice, so that answers can be told again.

    Args:
        input: `hidden`, the state that enters the layer; `position`, sines and cosines of the
            token's place in its row; `embedding`, what entered layer 0; `sum`, these three
            summed and standardised; `ones`, nothing. No gradient goes back through it.
        hidden_layers: of each module, ReLU, each 8 times narrower; 0 for one linear map.
        temperature: of the Gumbel-softmax.
        alpha: what a layer visit costs; not with `target`.
        target: the share e that is wanted, (2 / L, 1]; None for no such wish.
        weight: what it costs to miss the target.
        initial: the probability of going through before training, near 1 so that training starts
            near the full model; None for nn.Linear's own initialisation, as published.

    Raises:
        UsageError: a setting is out of its range, or both alpha and target are given.
    """

    name = "controller"
    decides = True

    def __init__(
        self,
        input: Literal["hidden", "position", "embedding", "sum", "ones"] = "hidden",
        *,
        hidden_layers: int = 0,
        temperature: float = 1.0,
        alpha: float = 0.0,
        target: float | None = None,
        weight: float = 10.0,
        initial: float | None = 0.95,
        scope: Scope = "answer",
        training_scope: Scope = "answer",
        skipped_kv: Literal["project", "hole"] = "project",
    ) -> None:
        super().__init__(scope=scope, training_scope=training_scope, skipped_kv=skipped_kv)
        if input not in INPUTS:
            raise unknown("input", input, INPUTS)
        if hidden_layers < 0:
            raise UsageError(f"hidden_layers is {hidden_layers}; give 0 or more.")
        if not temperature > 0:
            raise UsageError(f"temperature is {temperature}, but must be above 0.")
        if initial is not None and not 0 < initial < 1:
            raise UsageError(f"initial is {initial}, but must lie in (0, 1).")
        _check_wishes(alpha, target, weight)
        self.input, self.hidden_layers, self.temperature = input, hidden_layers, temperature
        self.alpha, self.target, self.weight, self.initial = alpha, target, weight, initial
        self.reads_start = input in ("position", "sum")
        self.reads_input = input in ("embedding", "sum")
        self._last: int | None = None  # of the stack that `check` saw: only `gate` asks, after it

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
        return Decider(width, self.hidden_layers, self.initial) if inner else None

    def bounds(self, layer: int) -> Bounds:
        return Bounds(0 if layer else 1, 1)

    def again(self, visit: Visit) -> Answer:
        gate = visit.gate
        if gate is None:
            return 1.0
        tell_untrained(visit, UNTRAINED)
        scope = visit.context.scope(visit.state)
        going: Tensor = gate(self._seen(visit), scope, self.temperature)
        if gate.training:
            learns = any(p.requires_grad for p in gate.parameters())
            counted = (going * scope).sum(), scope.sum(), learns
            visit.context.notes[self.name, visit.layer] = counted
        return going

    def look_flops(self, visit: Visit) -> int:
        return 0 if visit.gate is None else matrix_flops(visit.gate)

    def penalty(self, notes: Mapping[Any, Any]) -> Tensor | None:
        inner = [note for key, note in notes.items() if key[:1] == (self.name,)]
        if not inner or not (self.alpha or self.target is not None):
            return None
        shares = torch.stack([going / count.clamp(min=1) for going, count, _ in inner])
        if torch.is_grad_enabled() and inner[0][2] and not shares.requires_grad:
            raise HostError(
                "re-entrant gradient checkpointing hides from the loss what the controllers "
                'decide; turn it on with {"use_reentrant": False}.'
            )
        executed = (shares.sum() + 2) / (len(inner) + 2)  # the first and the last layer run
        if self.target is None:
            return self.alpha * executed
        return self.weight * (executed - self.target) ** 2

    def settings(self) -> dict[str, Any]:
        return {
            "input": self.input,
            "hidden_layers": self.hidden_layers,
            "temperature": self.temperature,
            "alpha": self.alpha,
            "target": self.target,
            "weight": self.weight,
            "initial": self.initial,
            "scope": self.scope,
            "training_scope": self.training_scope,
            "skipped_kv": self.skipped_kv,
        }

    def _seen(self, visit: Visit) -> Tensor:
        """What the module looks at. Shape: [B, T, D]."""
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


def start_linear(weight: Tensor, bias: Tensor) -> None:
    """First values as nn.Linear's own, [out, in] and [out]; values that were loaded stay."""
    init.kaiming_uniform_(weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(weight.shape[1])
    init.uniform_(bias, -bound, bound)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """sin(p / 10000^(2i/D)), then cos of the same. Shape: [B, T] -> FloatTensor [B, T, D]."""
    half = (width + 1) // 2
    steps = torch.arange(half, device=positions.device) / half
    angles = positions[..., None] * LONGEST_WAVE**-steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


def _check_wishes(alpha: float, target: float | None, weight: float) -> None:
    for name, value in (("alpha", alpha), ("weight", weight)):
        if not value >= 0:
            raise UsageError(f"{name} is {value}; give 0 or more.")
    if target is not None and not 0 < target <= 1:
        raise UsageError(f"target is {target}, but must lie in (0, 1].")
    if target is not None and alpha:
        raise UsageError(
            f"alpha is {alpha} and target is {target}, which contradict each other; give one: "
            "alpha makes visits dear, target names how many are wanted."
        )
