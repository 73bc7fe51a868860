"""How sure a prediction between layers is: what tells an early exit that a token may leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from trol.errors import UsageError

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
