"""Layer dropout: in training, rows skip layers at random, so that early exits learn to do."""

from __future__ import annotations

import math
from typing import Any

import torch

from trol.depth import AbstractPolicy, Answer, Bounds, Visit
from trol.depth.policy import check_share


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
