"""Early exit: a token leaves the stack at the first layer whose input gives a confident prediction.

Measures of confidence, the policy with its optional trained exit heads, and layer dropout, a way to
train a model so that it can be left early.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from trol.depth import Answer, Bounds, Scope, Visit
from trol.depth.policy import check_share, check_whole
from trol.depth.roles import Context, Mask
from trol.errors import UsageError, unknown
from trol.host.flops import matrix_flops
from trol.policies.base import DataclassPolicy, PolicyLinear, SkippedKV, linear, warn_if_untrained

Confidence = tuple[Tensor, Tensor | None]
"""The confidence of each token [...], and what this measure compares with at the next look."""

Measure = Callable[[Tensor, Tensor | None], Confidence]
"""(logits [..., V], what the look before kept) -> confidence; higher is surer."""


def entropy(logits: Tensor, before: Tensor | None = None) -> Confidence:
    """1 - H / log V with H = -sum_v p_v log p_v, in [0, 1]. Shape: [..., V] -> [...].

    BranchyNet's measure, subtracted from 1 (https://arxiv.org/abs/1709.01686).
    """
    logs = logits.float().log_softmax(-1)
    nats = -(logs.exp() * logs).nan_to_num(0.0).sum(-1)  # a token of probability 0 adds 0
    return 1 - nats / math.log(logits.shape[-1]), None


def margin(logits: Tensor, before: Tensor | None = None) -> Confidence:
    """p_1 - p_2, the two largest probabilities, in [0, 1]. Shape: [..., V] -> [...].

    CALM's softmax response (https://arxiv.org/abs/2207.07061, section 3.5).
    """
    best, second = logits.float().softmax(-1).topk(2).values.unbind(-1)
    return best - second, None


def saturation(logits: Tensor, before: Tensor | None = None) -> Confidence:
    """1 - sum_v |p_v - q_v| / 2 with q of the look before, in [0, 1]. Shape: [..., V] -> [...].

    The first look has no q, and its confidence is 0. CALM's saturation of hidden states
    (https://arxiv.org/abs/2207.07061, section 3.5), applied to predictions.
    """
    p = logits.float().softmax(-1)
    if before is None:
        return torch.zeros_like(p[..., 0]), p
    return 1 - (p - before).abs().sum(-1) / 2, p


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

UNTRAINED = (
    "EarlyExit's heads were never trained: they translate nothing, so tokens leave as the state "
    "that the head cannot read; EarlyExit(heads=False) needs none."
)


UNCALIBRATED = (
    "early_exit by its name alone has a threshold that was not calibrated on this model and means "
    "nothing: answers may be nonsense. `trol calibrate MODEL --exit margin` finds one and writes "
    "exits that trol.load attaches."
)


class ExitHead(PolicyLinear):
    """x + W x + b: what a state would be after the layers behind it; the identity before training.

    The tuned lens (https://arxiv.org/abs/2303.08112, section 3); computed in float32.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.mark_untrained()

    def forward(self, input: Tensor) -> Tensor:
        """The translated states. Shape: [..., D] -> [..., D]."""
        return (input.float() + linear(input, self.weight, self.bias)).to(input.dtype)


@dataclass(eq=False, repr=False)
class EarlyExit(DataclassPolicy):
    """a_0 = 0 for all layers from the first whose input is confident: c(x_0) >= threshold.

    A look reads x_0 by the host's final norm and head. In training every token visits every layer;
    the exit loss (`exit_loss` of a recipe's stage) is what trains a model to be left early.

    Args:
        measure: c: `entropy`, `margin`, `saturation` or `patience` (`trol.policies.exits`).
        threshold: one for all looks, or a list with one for each. It means nothing until it was
            calibrated on the model: SmolLM2-135M keeps 34 % of its words at a margin of 0.8. `trol
            calibrate MODEL --exit MEASURE` finds one and writes exits that `trol.load` attaches.
        first: the first layer before which a token may leave.
        every: looks are taken before layers first, first + every, first + 2 every, ...
        scope: which tokens may leave (Glavas et al.: prompts use all layers).
        skipped_kv: what later tokens see of one that left. `hole` kept 85 to 95 % of SmolLM2's
            words where `project` kept 69 to 89 %, but not every host can hide tokens; `trol
            calibrate` measures both.
        keep_first: tokens at the head of each sequence that never leave.
        heads: whether each look has a trained translator, `ExitHead`; the token then leaves as
            the translated state.

    Raises:
        UsageError: a setting is outside its range; or, once attached, `first` lies beyond the
            stack, the thresholds are not as many as the looks, or a measure that compares looks
            has only one.
    """

    name = "early_exit"
    by_name_alone = UNCALIBRATED
    decides = True
    reads_predictions = True

    measure: Literal["entropy", "margin", "saturation", "patience"] = "margin"
    threshold: float | Sequence[float] = 0.9
    _: KW_ONLY
    first: int = 1
    every: int = 1
    scope: Scope = "answer"
    skipped_kv: SkippedKV = "project"
    keep_first: int = 0
    heads: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure not in MEASURES:
            raise unknown("measure", self.measure, MEASURES)
        check_whole("first", self.first)
        check_whole("every", self.every, 1)
        value = self.threshold
        self.thresholds = tuple(value) if isinstance(value, Sequence) else (value,)
        if not self.thresholds:
            raise UsageError("no threshold given; give one, or one for each look.")
        for threshold in self.thresholds:
            _check_threshold(self.measure, threshold)
        self.threshold = self.thresholds[0] if len(self.thresholds) == 1 else self.thresholds
        self.translates = self.heads

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
        warn_if_untrained(visit, UNTRAINED)
        translated = visit.gate(visit.state)
        leaves_here = self._left(visit, translated) & ~_left_before(visit)
        return torch.where(leaves_here[..., None], translated, visit.state)

    def again(self, visit: Visit) -> Answer:
        if visit.context.training:
            return 1.0
        entered = self.heads and self.looks(visit.layer)
        left = visit.context.notes["left", visit.layer] if entered else self._left(visit)
        return float(not left) if isinstance(left, bool) else (~left).float()

    def _left(self, visit: Visit, state: Tensor | None = None) -> Mask:
        """Which tokens have left before this layer, noted for the next. Shape: [B, T]."""
        left, notes = _left_before(visit), visit.context.notes
        if self.looks(visit.layer) and not _all_left(left, visit):
            left = left | self._is_sure(visit, visit.state if state is None else state)
            notes["looked", visit.layer] = True
        notes["left", visit.layer] = left
        return left

    @torch.no_grad()
    def _is_sure(self, visit: Visit, state: Tensor) -> Tensor:
        notes = visit.context.notes
        before = notes.pop(("compared", visit.layer - self.every), None)
        confidence, to_compare = _measured(MEASURES[self.measure], visit.context, state, before)
        if to_compare is not None:
            notes["compared", visit.layer] = to_compare
        look = (visit.layer - self.first) // self.every
        return confidence >= self.thresholds[look if len(self.thresholds) > 1 else 0]

    def look_flops(self, visit: Visit) -> int:
        notes, readout = visit.context.notes, visit.context.readout
        if not self.looks(visit.layer) or visit.context.training:
            return 0
        translating = matrix_flops(visit.gate) if self.heads and visit.gate is not None else 0
        reads = notes.get(("looked", visit.layer), False) and readout is not None
        return translating + (readout.flops if reads else 0)  # type: ignore[union-attr]


def _measured(
    measure: Measure, context: Context, state: Tensor, before: Tensor | None
) -> Confidence:
    """The confidence of all tokens, of which so many are read at once that their logits fit.

    Shape: [B, T, D] -> [B, T].
    """
    rows, tokens = state.shape[:2]
    if torch.compiler.is_compiling() or context.readout is None:
        return measure(context.read(state), before)
    at_once = context.readout.at_once
    if rows * tokens <= at_once:
        return measure(context.read(state), before)
    flat = state.reshape(1, rows * tokens, -1).split(at_once, dim=1)
    earlier: Sequence[Tensor | None] = [None] * len(flat)
    if before is not None:
        earlier = before.reshape(1, rows * tokens, -1).split(at_once, dim=1)
    parts = [measure(context.read(some), last) for some, last in zip(flat, earlier, strict=True)]
    confidence = torch.cat([sure for sure, _ in parts], dim=1).view(rows, tokens)
    kept = [one for _, one in parts if one is not None]
    return confidence, torch.cat(kept, dim=1).view(rows, tokens, -1) if kept else None


def _check_threshold(measure: str, threshold: float) -> None:
    """Raises `UsageError` where no confidence of this measure is on both sides of `threshold`."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise UsageError(f"threshold is {threshold!r}; give a number, or one for each look.")
    if measure == "patience":
        if threshold < 1 or threshold % 1:
            raise UsageError(
                f"threshold is {threshold}, but patience counts looks that agree; give 1 or more."
            )
    elif not 0 <= threshold <= 1:
        raise UsageError(f"threshold is {threshold}, but {measure} lies in [0, 1].")


def _left_before(visit: Visit) -> Tensor:
    none = torch.zeros(visit.state.shape[:2], dtype=torch.bool, device=visit.state.device)
    return visit.context.notes.get(("left", visit.layer - 1), none)


def _all_left(left: Tensor, visit: Visit) -> bool:
    """Whether all tokens in scope have left; False where finding out is not worth the wait."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return bool((left | ~visit.context.scope(visit.state)).all())


@dataclass(eq=False, repr=False)
class LayerDropout(DataclassPolicy):
    """a_0 = 0 with probability p_l = rate (exp(l ln 2 / (L - 1)) - 1) in training, else 1.

    LayerSkip (https://arxiv.org/abs/2404.16710, section 4.1.1) with its curve over layers, and
    without one over time, as it fine-tunes. Each row of a batch draws for itself, from torch's
    generator. In evaluation this is the plain model. All rows are computed and then selected, so
    no time is saved.

    Args:
        rate: p of the last layer, in [0, 1).
    """

    name = "layer_dropout"
    decides = True

    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("rate", self.rate)

    def share(self, layer: int, layers: int) -> float:
        """p_l in a stack of `layers` layers."""
        return self.rate * (math.exp(layer * math.log(2) / max(layers - 1, 1)) - 1)

    def bounds(self, layer: int) -> Bounds:
        return Bounds(0 if layer and self.rate else 1, 1)

    def again(self, visit: Visit) -> Answer:
        context = visit.context
        if not context.training or not self.rate:
            return 1.0
        rows, tokens = visit.state.shape[:2]
        share = self.share(visit.layer, context.layers)
        # Drawn in any case, so that later draws are the same when a layer runs again.
        stays = torch.rand(rows, 1, device=visit.state.device) >= share
        stays = context.notes.setdefault(("stays", visit.layer), stays)
        return stays.float().expand(rows, tokens)
