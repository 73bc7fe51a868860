"""The losses of a stage: on labelled cells, on boards as words, and on conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trol.data.boards import COLOURS
from trol.data.pools import EMPTY
from trol.training.exit_loss import final_loss

NOTHING = "nothing"
"""The word for a cell without a tile."""


class CellReader(nn.Module):
    """The vision tower with two linear heads: colour and digit of each cell.

    loss = CE(colour) + CE(digit), a mean over the nine cells
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        width = model.config.vision_config.hidden_size
        self.vision_tower = model.model.vision_tower
        self.colour = nn.Linear(width, EMPTY[0] + 1)
        self.digit = nn.Linear(width, EMPTY[1] + 1)

    def forward(self, pixel_values: Tensor, cells: Tensor, **_: Any) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] and cells [B, 9, 2] to the loss."""
        states = self.vision_tower(pixel_values=pixel_values).last_hidden_state[
            :, -cells.shape[1] :
        ]
        ask = nn.functional.cross_entropy
        colour = ask(self.colour(states).flatten(0, 1), cells[..., 0].flatten())
        digit = ask(self.digit(states).flatten(0, 1), cells[..., 1].flatten())
        return {"loss": colour + digit}


class Reader(nn.Module):
    """A model that reads conversations, by the loss that its stage wants."""

    loss: Callable[..., Tensor]
    """(model, **inputs) -> the loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.loss = model, final_loss


class SymbolReader(Reader):
    """The decoder with each cell's words in place of what a tower would see.

    A cell is the sum of its words' embeddings and the projector's position embedding, at the
    place of its image token: the decoder learns to reason before it learns to see.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model)
        self.colours: Tensor
        self.digits: Tensor
        number = processor.tokenizer.convert_tokens_to_ids
        nothing = number(NOTHING)
        colours = [number(name) for name in COLOURS]
        digits = [number(str(digit)) for digit in range(10)]
        self.register_buffer("colours", torch.tensor([*colours, nothing]), persistent=False)
        self.register_buffer("digits", torch.tensor([*digits, nothing]), persistent=False)

    def forward(self, input_ids: Tensor, cells: Tensor, **inputs: Any) -> dict[str, Tensor]:
        """Token ids [B, T] and cells [B, 9, 2] to the loss."""
        table = self.model.get_input_embeddings()
        words = table(self.colours[cells[..., 0]]) + table(self.digits[cells[..., 1]])
        words = words + self.model.model.projector.positions.weight
        where = (input_ids == self.model.config.image_token_id)[..., None]
        embeds = table(input_ids).masked_scatter(where, words.to(table.weight.dtype))
        return {"loss": self.loss(self.model, inputs_embeds=embeds, **inputs)}


class BoardReader(Reader):
    """The whole model on pictures and conversations."""

    def forward(self, cells: Tensor, **inputs: Any) -> dict[str, Tensor]:
        """A batch of a `BoardPool` to the loss."""
        del cells
        return {"loss": self.loss(self.model, **inputs)}


class ConversationReader(Reader):
    """Any host on conversations, with whatever inputs its processor makes."""

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """A batch with `labels` [B, T] to the mean loss of its answer tokens."""
        return {"loss": self.loss(self.model, **inputs)}


@dataclass(frozen=True)
class Lesson:
    """How one kind of data is learnt."""

    reader: Callable[[Any, Any], nn.Module]
    """(model, processor) -> the module whose loss is minimised."""
    fewest: int
    """Tiles on each board, at least."""
    drawn: bool
    """Whether it looks at pictures."""


LESSONS: dict[str, Lesson] = {
    "cells": Lesson(lambda model, _: CellReader(model), fewest=8, drawn=True),
    "symbols": Lesson(SymbolReader, fewest=4, drawn=False),
    "boards": Lesson(lambda model, _: BoardReader(model), fewest=4, drawn=True),
}
"""The built-in data that a stage can name."""
