"""Chance in the place of a policy's choice: the control of whatever chooses tokens.

Layer dropout: in training, rows skip layers at random, so that early exits learn to do.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, Answer, Bounds, Scope, Visit
from trol.depth.policy import check_share
from trol.errors import UsageError

FACTOR, WORD = 0x45D9F3B, 2**32 - 1
"""Of a hash of 32-bit words whose products fit 64 bits, so that every device agrees on it. Sums and
products alone would not do: neighbours, and the same tokens of two layers, would go together."""


class RandomTokens(AbstractPolicy):
    """a_0 = 1 for a share of the tokens (visit = 1), or a_0 = 1, a_1 = 1 for it (visit = 2).

    In each layer another share: whether a token belongs to it follows from the seed, the layer and
    the token's position, so that it is the same with a cache and without, alone and in a batch.

    Args:
        share: how many of the tokens in scope make the visit, in [0, 1].
        visit: which visit they make and the others do not: 1, the others skip the layer; or 2, the
            others visit it once.
        seed: another number, other tokens.

    Raises:
        UsageError: a setting is out of its range.
    """

    name = "random_tokens"
    reads_start = True
    decides = True

    def __init__(
        self,
        share: float = 0.5,
        *,
        visit: Literal[1, 2] = 2,
        seed: int = 0,
        scope: Scope = "all",
        skipped_kv: Literal["project", "hole"] = "project",
    ) -> None:
        super().__init__(scope=scope, skipped_kv=skipped_kv)
        if not (isinstance(share, int | float) and 0 <= share <= 1):
            raise UsageError(f"share is {share!r}, but must be a number in [0, 1].")
        if visit not in (1, 2):
            raise UsageError(f"visit is {visit!r}; give 1 to skip layers, or 2 to repeat them.")
        if not isinstance(seed, int):
            raise UsageError(f"seed is {seed!r}, but must be a whole number.")
        self.share, self.visit, self.seed = share, visit, seed

    def bounds(self, layer: int) -> Bounds:
        return Bounds(self.visit - 1, self.visit)

    def again(self, visit: Visit) -> Answer:
        if visit.number < self.visit - 1:
            return 1.0
        positions = visit.context.positions(visit.state)
        rows, tokens = visit.state.shape[:2]
        drawn = _drawn(positions, self.seed, visit.layer)
        return (drawn < self.share).float().expand(rows, tokens)

    def settings(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "visit": self.visit,
            "seed": self.seed,
            "scope": self.scope,
            "skipped_kv": self.skipped_kv,
        }


def _drawn(positions: Tensor, seed: int, layer: int) -> Tensor:
    """One number in [0, 1) for each position. Shape: [..., T], in and out."""
    mixed = _mixed(_mixed(_mixed(seed + 1) + layer) + positions)
    return (mixed >> 8) / 2**24  # 24 bits: all that float32 holds below 1


def _mixed(word: Any) -> Any:
    word = word & WORD
    for _ in range(2):
        word = (((word >> 16) ^ word) * FACTOR) & WORD
    return (word >> 16) ^ word


class LayerDropout(AbstractPolicy):
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

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        check_share("rate", rate)
        self.rate = rate

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
        # Drawn in any case, so that what else is drawn comes out the same when a layer runs again.
        drawn = torch.rand(rows, 1, device=visit.state.device) >= share
        kept = context.notes.setdefault(("kept", visit.layer), drawn)
        return kept.float().expand(rows, tokens)

    def settings(self) -> dict[str, Any]:
        return {"rate": self.rate}
