"""The projector: vision features into the decoder's embedding space."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN


class TrolProjector(nn.Module):
    """Two linear layers with an activation between, then optional learned positions.

    y_t = W_2 · act(W_1 · n(x_t) + b_1) + b_2 + p_t, where t counts the tokens of one image and n
    is a LayerNorm or nothing. Without p a decoder cannot tell where in the image a token lies if
    the tower's features do not say.
    """

    def __init__(
        self,
        vision_size: int,
        hidden_size: int,
        text_size: int,
        *,
        act: str,
        positions: int,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_size) if norm else None
        self.linear_1 = nn.Linear(vision_size, hidden_size)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, text_size)
        self.positions = nn.Embedding(positions, text_size) if positions else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [N, P, vision_size] -> [N, P, text_size]."""
        features = features if self.norm is None else self.norm(features)
        projected = self.linear_2(self.act(self.linear_1(features)))
        return projected if self.positions is None else projected + self.positions.weight


def pixel_shuffle(features: torch.Tensor, ratio: float) -> torch.Tensor:
    """One feature from each block of k x k neighbours, k = 1 / ratio, side by side.

    [N, rows, columns, C] -> [N, rows / k, columns / k, C · k²]; within a block row by row.
    """
    images, rows, columns, width = features.shape
    block = round(1 / ratio)
    blocks = features.view(images, rows // block, block, columns // block, block, width)
    return blocks.transpose(2, 3).reshape(
        images, rows // block, columns // block, width * block * block
    )
