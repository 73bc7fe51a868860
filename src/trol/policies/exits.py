"""Early exit, decided while running: a token leaves the stack where its prediction is sure.

How sure a prediction between layers is: what tells an early exit that a token may leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trol.depth import AbstractPolicy, Answer, Bounds, Scope, Visit
from trol.depth.roles import Mask
from trol.errors import UsageError, unknown
from trol.host.flops import matrix_flops
from trol.policies.parameters import OwnLinear, tell_untrained

Confidence = tuple[Tensor, Tensor | None]
"""How sure each token is, [...], and what the next look compares with, if this measure does."""

Measure = Callable[[Tensor, Tensor | None], Confidence]
"""(logits [..., V], what the look before left) -> confidence; higher is surer."""


def entropy(logits: Tensor, before: Tensor | None = None) -> Confidence:
    """1 - H / log V with H = -sum_v p_v log p_v, in [0, 1]. Shape: [..., V] -> [...].

    BranchyNet's measure, turned round (https://arxiv.org/abs/1709.01686).
    """
    del before
    logs = logits.float().log_softmax(-1)
    spread = -(logs.exp() * logs).nan_to_num(0.0).sum(-1)  # a token of probability 0 adds 0
    return 1 - spread / math.log(logits.shape[-1]), None


def margin(logits: Tensor, before: Tensor | None = None) -> Confidence:
    """p_1 - p_2, the two largest probabilities, in [0, 1]. Shape: [..., V] -> [...].

    CALM's softmax response (https://arxiv.org/abs/2207.07061, section 3.5).
    """
    del before
    best, second = logits.float().softmax(-1).topk(2).values.unbind(-1)
    return best - second, None


def saturation(logits: Tensor, before: Tensor | None = None) -> Confidence:
    """1 - sum_v |p_v - q_v| / 2 with q of the look before, in [0, 1]. Shape: [..., V] -> [...].

    The first look has nothing to agree with, and its confidence is 0. CALM's saturation of
    hidden states (https://arxiv.org/abs/2207.07061, section 3.5), of predictions here.
    """
    said = logits.float().softmax(-1)
    if before is None:
        return torch.zeros_like(said[..., 0]), said
    return 1 - (said - before).abs().sum(-1) / 2, said


def patience(logits: Tensor, before: Tensor | None = None) -> Confidence:
    """How many looks in a row left the most probable token as it was. Shape: [..., V] -> [...].

    PABEE (https://arxiv.org/abs/2006.04152, section 3.2).
    """
    best = logits.argmax(-1)
    if before is None:
        unchanged = torch.zeros_like(best)
    else:
        unchanged = torch.where(best == before[..., 0], before[..., 1] + 1, 0)
    return unchanged.float(), torch.stack([best, unchanged], dim=-1)


MEASURES: dict[str, Measure] = {
    "entropy": entropy,
    "margin": margin,
    "saturation": saturation,
    "patience": patience,
}
"""Every measure by name."""

COMPARING = ("saturation", "patience")
"""Measures that compare a look with the one before."""


def check_threshold(measure: str, threshold: float) -> None:
    """Raises `UsageError` where no confidence of this measure is on both sides of `threshold`."""
    if not isinstance(threshold, Real):
        raise UsageError(f"threshold is {threshold!r}; give a number, or one for each look.")
    if measure == "patience":
        if threshold < 1 or threshold != int(threshold):
            raise UsageError(
                f"threshold is {threshold}, but patience counts looks that agree; give 1 or more."
            )
    elif not 0 <= threshold <= 1:
        raise UsageError(f"threshold is {threshold}, but {measure} lies in [0, 1].")


UNTRAINED = (
    "EarlyExit's heads were never trained: they translate nothing, so tokens leave as the state "
    "that the head cannot read; EarlyExit(heads=False) needs none."
)


class ExitHead(OwnLinear):
    """x + W x + b: what a state would be, were the layers behind it run; the identity at first.

    The tuned lens (https://arxiv.org/abs/2303.08112, section 3); computed in float32.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.start_over()

    def start_over(self) -> None:
        """Sets the parameters to their first values."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.begin()

    def forward(self, input: Tensor) -> Tensor:
        """The translated states. Shape: [..., D] -> [..., D]."""
        with torch.autocast(input.device.type, enabled=False):
            state = input.float()
            move = nn.functional.linear(state, self.weight.float(), self.bias.float())
            return (state + move).to(input.dtype)


class EarlyExit(AbstractPolicy):
    """a_0 = 0 for all layers from the first before which a token is sure: c(x_0) >= threshold.

    A look reads x_0 by the host's final norm and head. In training every token visits every
    layer: what learns to be left is taught by the exit loss (`exit_loss` of a recipe's stage).

    Args:
        measure: c: `entropy`, `margin`, `saturation` or `patience` (`trol.policies.exits`).
        threshold: one for all looks, or a list with one for each; `trol calibrate` finds one.
        first: the first layer before which a token may leave.
        every: looks are taken before layers first, first + every, first + 2 every, ...
        scope: who may leave (Glavas et al.: prompts use all layers).
        skipped_kv: what later tokens see of one that left.
        heads: whether each look has a trained translator, `ExitHead`; the token then leaves as
            what its translator made of it.

    Raises:
        UsageError: a setting is outside its range; or, once attached, `first` lies beyond the
            stack, the thresholds are not as many as the looks, or a measure that compares looks
            has only one.
    """

    name = "early_exit"
    decides = True
    reads_predictions = True

    def __init__(
        self,
        measure: Literal["entropy", "margin", "saturation", "patience"] = "margin",
        threshold: float | Sequence[float] = 0.9,
        *,
        first: int = 1,
        every: int = 1,
        scope: Scope = "answer",
        skipped_kv: Literal["project", "hole"] = "project",
        heads: bool = False,
    ) -> None:
        super().__init__(scope=scope, skipped_kv=skipped_kv)
        if measure not in MEASURES:
            raise unknown("measure", measure, MEASURES)
        if first < 0:
            raise UsageError(f"first is {first}; give the number of a layer, 0 or more.")
        if every < 1:
            raise UsageError(f"every is {every}; give 1 to look before each layer, or more.")
        self.thresholds = tuple(threshold) if isinstance(threshold, Sequence) else (threshold,)
        if not self.thresholds:
            raise UsageError("no threshold given; give one, or one for each look.")
        for one in self.thresholds:
            check_threshold(measure, one)
        self.measure, self.first, self.every, self.heads = measure, first, every, heads
        self.translates = heads

    def looks(self, layer: int) -> bool:
        """Whether tokens may leave before this layer."""
        return layer >= self.first and (layer - self.first) % self.every == 0

    def check(self, layers: int) -> None:
        looks = [layer for layer in range(layers) if self.looks(layer)]
        if not looks:
            raise UsageError(
                f"first is {self.first}, but the stack has layers 0 to {layers - 1}; give a first "
                "layer among them."
            )
        if len(self.thresholds) not in (1, len(looks)):
            raise UsageError(
                f"{len(self.thresholds)} thresholds for {len(looks)} looks (before layers "
                f"{', '.join(map(str, looks))}); give one for each, or one for all."
            )
        if self.measure in COMPARING and len(looks) == 1:
            raise UsageError(
                f"{self.measure} compares looks, but the only one is before layer {looks[0]}; "
                "give a lower first or every."
            )

    def gate(self, layer: int, width: int) -> nn.Module | None:
        return ExitHead(width) if self.heads and self.looks(layer) else None

    def learns(self, layer: int) -> bool:
        return False  # its heads learn from the exit loss

    def bounds(self, layer: int) -> Bounds:
        return Bounds(1 if layer < self.first else 0, 1)

    def enter(self, visit: Visit) -> Tensor:
        if visit.context.training or not self.looks(visit.layer):
            return visit.state
        assert visit.gate is not None
        tell_untrained(visit, UNTRAINED)
        own = visit.gate(visit.state)
        leaving = self._left(visit, own) & ~_left_before(visit)
        return torch.where(leaving[..., None], own, visit.state)

    def again(self, visit: Visit) -> Answer:
        if visit.context.training:
            return 1.0
        entered = self.heads and self.looks(visit.layer)
        left = visit.context.notes["left", visit.layer] if entered else self._left(visit)
        return float(not left) if isinstance(left, bool) else (~left).float()

    def _left(self, visit: Visit, state: Tensor | None = None) -> Mask:
        """Who has left before this layer, noted for the next. Shape: [B, T]."""
        left, notes = _left_before(visit), visit.context.notes
        if self.looks(visit.layer) and not _all_left(left, visit):
            seen = visit.state if state is None else state
            left = left | self._sure(visit, seen)
            notes["looked", visit.layer] = True
        notes["left", visit.layer] = left
        return left

    @torch.no_grad()
    def _sure(self, visit: Visit, state: Tensor) -> Tensor:
        notes = visit.context.notes
        before = notes.pop(("said", visit.layer - self.every), None)
        sure, kept = MEASURES[self.measure](visit.context.read(state), before)
        if kept is not None:
            notes["said", visit.layer] = kept
        number = (visit.layer - self.first) // self.every
        return sure >= self.thresholds[number if len(self.thresholds) > 1 else 0]

    def look_flops(self, visit: Visit) -> int:
        notes, readout = visit.context.notes, visit.context.readout
        if not self.looks(visit.layer) or visit.context.training:
            return 0
        translating = matrix_flops(visit.gate) if self.heads and visit.gate is not None else 0
        reads = notes.get(("looked", visit.layer), False) and readout is not None
        return translating + (readout.flops if reads else 0)  # type: ignore[union-attr]

    def settings(self) -> dict[str, Any]:
        one = len(self.thresholds) == 1
        return {
            "measure": self.measure,
            "threshold": self.thresholds[0] if one else list(self.thresholds),
            "first": self.first,
            "every": self.every,
            "scope": self.scope,
            "skipped_kv": self.skipped_kv,
            "heads": self.heads,
        }


def _left_before(visit: Visit) -> Tensor:
    rows, tokens = visit.state.shape[:2]
    nobody = torch.zeros(rows, tokens, dtype=torch.bool, device=visit.state.device)
    return visit.context.notes.get(("left", visit.layer - 1), nobody)


def _all_left(left: Tensor, visit: Visit) -> bool:
    """Whether nobody is left to look at; looked at only where that may wait for a device."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return bool((left | ~visit.context.scope(visit.state)).all())
