"""What one stage works with: the model as it learns, and what it learns from."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn

from trol.data.board_pool import BoardPool, board_pool
from trol.data.conversations import ConversationCollator, SoundRows
from trol.data.mixture import Mixture, open_mixture
from trol.data.own_files import Pair, shortened
from trol.data.pairs import is_pairs, pairs_of
from trol.errors import DataError, UsageError
from trol.family import TrolProcessor
from trol.host.weights import is_quantised
from trol.training.losses import LESSONS, ConversationReader, Lesson
from trol.training.low_rank import has_visit_updates, low_rank, merged
from trol.training.recipe import DATA, Recipe, Stage
from trol.training.trainable import freeze_unvisited, let_gradients_through, let_learn, settle

BOARD_SEEDS = 1_000_000
"""Board seeds that belong to one recipe seed."""


WARMUP = 0.25
"""The largest share of a stage in which its rates may rise."""


class Material(NamedTuple):
    """What a Trainer needs besides its arguments."""

    reader: nn.Module
    """Takes a batch and gives its loss."""
    rows: Any
    """A map-style dataset; item i may be i itself."""
    collate: Callable[..., dict[str, Any]]
    """Items to a batch."""


def learner_of(model: Any, stage: Stage) -> Any:
    """The model with what this stage lets learn, low-rank updates in place if it wants them.

    Raises:
        HostError: the model lacks a part that is to learn, or its weights cannot.
        UsageError: it carries low-rank updates of another form.
    """
    learner = model
    if stage.lora:
        learner = low_rank(model, stage.lora, stage.lora_alpha, per_visit=stage.per_visit)
    let_gradients_through(learner)
    let_learn(learner, stage.train, low_rank=isinstance(learner, PeftModel))
    if stage.traverse:
        freeze_unvisited(learner)
    return learner


def finished(learner: Any, stage: Stage) -> Any:
    """The model after the stage, all of it free to learn again.

    Low-rank updates are merged, unless the stage says otherwise or they cannot be: then the PEFT
    model itself is given back, which the next stage goes on with and `save_trained` saves.
    """
    settle(learner, stage.train)
    if isinstance(learner, PeftModel) and _may_merge(learner, stage):
        learner = merged(learner)
        settle(learner, stage.train)
    return learner.eval()


def material(learner: Any, processor: Any, stage: Stage, seed: int) -> Material:
    """What the stage's data are, for this learner.

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
    lesson = LESSONS[stage.data]
    pool = _pool(processor, _asks(stage, lesson), seed)
    return Material(lesson.reader(learner, processor), pool, pool.batch)


def check_data(name: str, stage: Stage) -> None:
    """Looks for the files that a stage learns from, before anything is opened for it.

    Raises:
        UsageError: there is no such file.
        DataError: a file is missing, broken as a whole, or without a row that can be learnt from.
    """
    if is_pairs(stage.data):
        rows = pairs_of(stage.data, "train", limit=1)
    elif stage.data not in DATA:
        rows = _mixture(stage)
    else:
        return
    if not len(rows):
        raise DataError(f"{stage.data}, which stage {name} learns from, has no rows; give some.")


def _mixture(stage: Stage) -> Mixture:
    mixture = open_mixture(stage.data)
    if not len(mixture) and mixture.skipped:
        left = [f"{n} {kind}" for kinds in mixture.skipped.values() for kind, n in kinds.items()]
        raise DataError(
            f"all rows of {stage.data} are left out: {', '.join(left)}, as {mixture.list_at} says; "
            "run `trol data check` again, or delete that list."
        )
    return mixture


def sized(stage: Stage, rows: Any) -> Stage:
    """The stage with its length in steps; call it on `material(...).rows` before all that counts.

    steps = ceil(epochs · rows / batch); the warm-up is at most steps · `WARMUP`
    """
    steps = stage.steps or max(1, math.ceil(stage.epochs * len(rows) / stage.batch))
    warmup = min(stage.warmup_steps, int(WARMUP * steps))
    return dataclasses.replace(stage, steps=steps, epochs=0.0, warmup_steps=warmup)


def trainer_settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What of a recipe and a stage (after `sized`) goes into `TrainingArguments`.

    Each of the W processes computes batch / (accumulate · W) conversations at once.
    (Checkpointing of activations is turned on in the model, by `opened`.)

    Raises:
        UsageError: the batch cannot be divided so.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = stage.accumulate * processes
    if stage.batch % parts:
        raise UsageError(
            f"a batch of {stage.batch} cannot be divided among {processes} processes in "
            f"{stage.accumulate} parts each; give a batch that is a multiple of {parts}."
        )
    return {
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch // parts,
        "gradient_accumulation_steps": stage.accumulate,
        "bf16": recipe.precision == "bf16",
    }


def _may_merge(learner: PeftModel, stage: Stage) -> bool:
    return stage.merge and not is_quantised(learner) and not has_visit_updates(learner)


def _conversations(learner: Any, processor: Any, stage: Stage) -> Material:
    mixture, most = _mixture(stage), _most_tokens(learner, stage)
    for source, reasons in mixture.skipped.items():
        left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        warnings.warn(f"rows of {source} left out as quarantined: {left}", stacklevel=2)
    collate = ConversationCollator(processor, most_tokens=most)
    sound = SoundRows(mixture, collate, mixture.where)
    return Material(ConversationReader(learner), sound, sound.batch)


def _most_tokens(learner: Any, stage: Stage) -> int | None:
    """Tokens that a conversation may have: the stage's limit, and the positions of the host."""
    positions = getattr(learner.config.get_text_config(), "max_position_embeddings", None)
    return min((most for most in (stage.max_tokens, positions) if most), default=None)


TEMPLATE_TOKENS = 8
"""Tokens of a row kept for what a chat template adds to question and answer."""


def _pairs(learner: Any, processor: Any, stage: Stage, seed: int) -> Material:
    """Questions and answers of the train split, in the order that the seed gives."""
    tokenizer = getattr(processor, "tokenizer", processor)
    pairs = pairs_of(stage.data, "train", seed=seed)
    if stage.prompt_share:
        pairs = [_cut(pair, tokenizer, stage) for pair in pairs]
    collate = ConversationCollator(processor, most_tokens=_most_tokens(learner, stage))
    rows = [pair.messages() for pair in pairs]
    sound = SoundRows(rows, collate, lambda number: f"{stage.data}, pair {number} of the seed's")
    return Material(ConversationReader(learner), sound, sound.batch)


def _cut(pair: Pair, tokenizer: Any, stage: Stage) -> Pair:
    question = int(stage.prompt_share * stage.max_tokens)
    answer = max(1, stage.max_tokens - question - TEMPLATE_TOKENS)
    return shortened(pair, tokenizer, question=question, answer=answer)


class Asks(NamedTuple):
    """Which boards and questions a stage learns from; the arguments of `board_pool`."""

    boards: int
    turns_each: int
    packed: float
    easy: bool
    fewest: int
    drawn: bool


def _asks(stage: Stage, lesson: Lesson) -> Asks:
    boards = min(stage.boards, stage.steps * stage.batch) if stage.steps else stage.boards
    asks = (boards, stage.questions, stage.packed, stage.easy)
    return Asks(*asks, fewest=lesson.fewest, drawn=lesson.drawn)


@lru_cache(maxsize=4)
def _pool(processor: TrolProcessor, asks: Asks, seed: int) -> BoardPool:
    # Cached, because both arms of a comparison learn from the same boards.
    return board_pool(processor, "train", first=seed * BOARD_SEEDS, **asks._asdict())
