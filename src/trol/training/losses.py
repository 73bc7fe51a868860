"""The losses of a stage: on labelled cells, on boards as words, and on conversations.

The exit loss: the stack learns to be left early, each layer's output read as if the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trol.data.boards import COLOURS
from trol.data.pools import EMPTY
from trol.depth import attached
from trol.depth.attachment import gates_of
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL
from trol.errors import HostError, UsageError
from trol.training.recipe import Stage


def final_loss(model: Any, **inputs: Any) -> Tensor:
    """The host's own loss: that of its last layer's output."""
    return model(use_cache=False, **inputs).loss


def weights(layers: int, scale: float) -> list[float]:
    """e(l) = scale * sum_{i<=l} i, and of the last layer L - 1 + scale * sum_{i<=L-2} i.

    LayerSkip (https://arxiv.org/abs/2404.16710, equation 6).
    """
    early = [scale * layer * (layer + 1) / 2 for layer in range(layers - 1)]
    return [*early, layers - 1 + scale * (layers - 2) * (layers - 1) / 2]


@dataclass
class ExitLoss:
    """J = sum_l C(t, l) e(l) CE(head(norm(x_{l+1})), labels) / sum_l C(t, l) e(l).

    LayerSkip (https://arxiv.org/abs/2404.16710, section 4.1.2): x_{l+1} is what leaves layer l, C
    says which exits learn at step t, the last layer always does. e(0) = 0, so that nothing is
    asked of the first layer. Where the attached policy has trained exit heads, exits are before
    the layers that carry one, and x goes through it first. What the host adds to its own loss
    stays as it is.
    """

    scale: float
    """How much the early exits count, beside the last layer."""
    curriculum: str = "none"
    """One of `trol.training.recipe.CURRICULA`."""
    every: int = 1
    """Every how many-th exit learns."""
    step: int = 0
    """t, in optimiser steps."""
    steps: int = 1
    """Of the whole stage."""

    def __call__(self, model: Any, **inputs: Any) -> Tensor:
        """The loss of a batch with `labels` [B, T]; a mean over answer tokens.

        Raises:
            HostError: the host shows no hidden states.
            UsageError: the stack has too few layers.
        """
        host, stack = attached(model)
        said = model(use_cache=False, output_hidden_states=True, **inputs)
        states, layers = said.hidden_states, stack.depth_layers
        if states is None or len(states) != layers + 1:
            raise HostError(
                f"{type(host).__name__} does not show what leaves each of its {layers} layers, "
                "which the exit loss reads; set exit_loss to 0."
            )
        answers = _Answers(inputs["labels"], inputs.get("num_items_in_batch"))
        shares = weights(layers, self.scale)
        learns = self.enabled(exits_of(stack))
        last, total = answers.loss(answers.of(said.logits)), shares[-1]
        read, heads = Readout(host), gates_of(stack) if stack.depth_policy.translates else None
        loss = 0.0
        for layer in learns:
            state = answers.of(states[layer + 1])
            head = None if heads is None else heads[layer + 1]
            early = answers.loss(read(state if head is None else head(state)))
            loss, total = loss + shares[layer] * (early - last), total + shares[layer]
        # said.loss is `last`, with what the host and the policy add to it.
        return said.loss + loss / total

    def enabled(self, exits: list[int]) -> list[int]:
        """The exits that learn at this step, beside the last layer."""
        count = len(exits)
        if self.curriculum == "rotational":
            turn = min(self.every, count)
            return [layer for place, layer in enumerate(exits) if (place - self.step) % turn == 0]
        if self.curriculum == "gradual":
            count = min(count, 1 + 2 * count * self.step // max(self.steps, 1))
        return exits[::-1][:count][:: self.every][::-1]


def exits_of(stack: Any) -> list[int]:
    """The layers whose outputs can be taught to be the last, but for the last one.

    Raises:
        UsageError: there is none.
    """
    gates, policy = gates_of(stack), stack.depth_policy
    found = [
        layer
        for layer in range(1, stack.depth_layers - 1)
        if not policy.translates or gates[layer + 1] is not None
    ]
    if not found:
        raise UsageError(
            f"exit_loss teaches exits behind layers 1 to L - 2, and this stack of "
            f"{stack.depth_layers} layers with {policy} has none there; take a deeper model, or "
            "set exit_loss to 0."
        )
    return found


def teach_exits(reader: Any, learner: Any, stage: Stage) -> list[TrainerCallback]:
    """Gives the reader its stage's exit loss, if there is one; returns what tells it the step.

    Raises:
        UsageError: the learner has no exits.
    """
    if not stage.exit_loss:
        return []
    exits_of(attached(learner)[1])
    reader.loss = ExitLoss(stage.exit_loss, stage.exit_curriculum, stage.exit_every)
    return [AtStep(reader.loss)]


class AtStep(TrainerCallback):
    """Tells an exit loss which step it is."""

    def __init__(self, loss: ExitLoss) -> None:
        self.loss = loss

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self.loss.step, self.loss.steps = state.global_step, state.max_steps


class _Answers:
    """The places of a batch that predict an answer token, and what they should say."""

    def __init__(self, labels: Tensor, items: Tensor | int | None) -> None:
        self.chosen = labels[:, 1:] != IGNORED_LABEL
        self.labels, self.items = labels[:, 1:][self.chosen], items

    def of(self, states: Tensor) -> Tensor:
        """What the states or logits hold at these places. Shape: [B, T, D] -> [N, D]."""
        return states[:, :-1][self.chosen.to(states.device)]

    def loss(self, logits: Tensor) -> Tensor:
        """Cross-entropy, as transformers takes it: a mean, or this part's share of a batch's."""
        how = "mean" if self.items is None else "sum"
        labels = self.labels.to(logits.device)
        total = nn.functional.cross_entropy(logits.float(), labels, reduction=how)
        return total if self.items is None else total / self.items


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
