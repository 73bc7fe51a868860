"""The data of a stage: its rows, their batches, and the module that computes a batch's loss."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trol.data.board_pool import EMPTY, board_pool
from trol.data.boards import COLOURS, NOTHING
from trol.data.conversations import ConversationCollator, SoundRows
from trol.data.mixture import Mixture, open_mixture
from trol.data.own_files import shortened
from trol.data.pairs import is_pairs, pairs_of
from trol.errors import DataError, UsageError
from trol.family import TrolProcessor
from trol.training.losses import final_loss
from trol.training.recipe import DATA, Stage

BOARD_SEEDS = 1_000_000
"""Board seeds that belong to one recipe seed."""

WARMUP = 0.25
"""The largest share of a stage in which its rates may rise."""

TEMPLATE_TOKENS = 8
"""Tokens of a row kept for what a chat template adds to question and answer."""


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
        output = self.vision_tower(pixel_values=pixel_values)
        states = output.last_hidden_state[:, -cells.shape[1] :]
        losses = [
            nn.functional.cross_entropy(head(states).flatten(0, 1), cells[..., i].flatten())
            for i, head in enumerate((self.colour, self.digit))
        ]
        return {"loss": losses[0] + losses[1]}


class Reader(nn.Module):
    """A model on conversations, with whatever inputs its processor makes.

    Args:
        model: the model.
        loss: (model, **inputs) -> the mean loss of answer tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.loss: Callable[..., Tensor] = final_loss

    def forward(self, cells: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """A batch with `labels` [B, T] to its loss; `cells` of boards are for other readers."""
        del cells
        return {"loss": self.loss(self.model, **inputs)}


class SymbolReader(Reader):
    """The decoder, with the words of each cell in place of image tokens.

    A cell is the sum of its words' embeddings and the projector's position embedding, at the
    place of its image token: the decoder learns to reason before it learns to see.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model)
        self.colours: Tensor
        self.digits: Tensor
        number = processor.tokenizer.convert_tokens_to_ids
        for name, words in (("colours", COLOURS), ("digits", map(str, range(10)))):
            ids = torch.tensor([number(word) for word in (*words, NOTHING)])
            self.register_buffer(name, ids, persistent=False)

    def forward(self, input_ids: Tensor, cells: Tensor, **inputs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Token ids [B, T] and cells [B, 9, 2] to the loss."""
        table = self.model.get_input_embeddings()
        words = table(self.colours[cells[..., 0]]) + table(self.digits[cells[..., 1]])
        words = words + self.model.model.projector.positions.weight
        where = (input_ids == self.model.config.image_token_id)[..., None]
        embeds = table(input_ids).masked_scatter(where, words.to(table.weight.dtype))
        return {"loss": self.loss(self.model, inputs_embeds=embeds, **inputs)}


class StageData(NamedTuple):
    """The data of a stage, as Trainer takes them."""

    reader: Any
    """The module that takes a batch and gives its loss."""
    rows: Any
    """A map-style dataset; item i may be i itself."""
    collate: Callable[..., dict[str, Any]]
    """Makes a batch of items of `rows`."""


def stage_data(learner: Any, processor: Any, stage: Stage, seed: int) -> StageData:
    """The stage's data, for this learner.

    Raises:
        UsageError: boards are asked for, but the processor is not a TroL model's.
        DataError: the files of a mixture are missing or broken.
    """
    if is_pairs(stage.data):
        return _pairs(learner, processor, stage, seed)
    if stage.data not in DATA:
        return _conversations(learner, processor, stage)
    if not isinstance(processor, TrolProcessor):
        raise UsageError(
            f"the built-in {stage.data} are made for TroL models, not for "
            f"{type(processor).__name__}; give a mixture or a chat file as data."
        )
    if stage.data == "cells":
        reader = CellReader(learner)
    else:
        words = stage.data == "symbols"
        reader = SymbolReader(learner, processor) if words else Reader(learner)
    pool = _pool(
        processor,
        "train",
        first=seed * BOARD_SEEDS,
        boards=min(stage.boards, stage.steps * stage.batch or stage.boards),
        turns_each=stage.questions,
        packed=stage.packed,
        easy=stage.easy,
        fewest=8 if stage.data == "cells" else 4,
        drawn=stage.data != "symbols",
        captions=stage.data == "captions",
    )
    return StageData(reader, pool, pool.batch)


_pool = lru_cache(maxsize=4)(board_pool)
"""Both arms of a comparison learn from the same boards, which are drawn once."""


def check_data(name: str, stage: Stage) -> None:
    """Looks for the files that a stage learns from, before anything is opened for it.

    Raises:
        UsageError: there is no such file.
        DataError: a file is missing, broken as a whole, or without a row that can be learnt from.
    """
    if stage.data in DATA:
        return
    pairs = is_pairs(stage.data)
    if not len(pairs_of(stage.data, "train", limit=1) if pairs else _mixture(stage)):
        raise DataError(f"{stage.data}, which stage {name} learns from, has no rows; give some.")


def sized(stage: Stage, rows: Any) -> Stage:
    """The stage with its length in steps, for the rows of its data.

    steps = ceil(epochs · rows / batch); the warm-up is at most steps · `WARMUP`
    """
    steps = stage.steps or max(1, math.ceil(stage.epochs * len(rows) / stage.batch))
    warmup = min(stage.warmup_steps, int(WARMUP * steps))
    return dataclasses.replace(stage, steps=steps, epochs=0.0, warmup_steps=warmup)


def _mixture(stage: Stage) -> Mixture:
    mixture = open_mixture(stage.data)
    if not len(mixture) and mixture.skipped:
        counts = [f"{n} {kind}" for kinds in mixture.skipped.values() for kind, n in kinds.items()]
        raise DataError(
            f"all rows of {stage.data} are left out: {', '.join(counts)}, as {mixture.list_at} "
            "says; run `trol data check` again, or delete that list."
        )
    return mixture


def _conversations(learner: Any, processor: Any, stage: Stage) -> StageData:
    mixture = _mixture(stage)
    for source, reasons in mixture.skipped.items():
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        warnings.warn(f"rows of {source} left out as quarantined: {counts}", stacklevel=2)
    collate = ConversationCollator(processor, most_tokens=_most_tokens(learner, stage))
    sound = SoundRows(mixture, collate, mixture.where)
    return StageData(Reader(learner), sound, sound.batch)


def _pairs(learner: Any, processor: Any, stage: Stage, seed: int) -> StageData:
    """Questions and answers of the train split, in the order that the seed gives."""
    tokenizer = getattr(processor, "tokenizer", processor)
    pairs = pairs_of(stage.data, "train", seed=seed)
    if stage.prompt_share:
        question = int(stage.prompt_share * stage.max_tokens)
        answer = max(1, stage.max_tokens - question - TEMPLATE_TOKENS)
        pairs = [shortened(pair, tokenizer, question=question, answer=answer) for pair in pairs]
    rows = [pair.messages() for pair in pairs]
    collate = ConversationCollator(processor, most_tokens=_most_tokens(learner, stage))
    sound = SoundRows(rows, collate, lambda number: f"{stage.data}, pair {number} of the seed's")
    return StageData(Reader(learner), sound, sound.batch)


def _most_tokens(learner: Any, stage: Stage) -> int | None:
    """Tokens that a conversation may have: the stage's limit, and the positions of the host."""
    positions = getattr(learner.config.get_text_config(), "max_position_embeddings", None)
    return min((most for most in (stage.max_tokens, positions) if most), default=None)
