"""What one stage works with: the model as it learns, and what it learns from."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from trol.data.pools import BoardPool, board_pool
from trol.family import TrolProcessor
from trol.training.low_rank import low_rank
from trol.training.parts import let_learn
from trol.training.recipe import Stage
from trol.training.stages import LESSONS, Lesson

BOARD_SEEDS = 1_000_000
"""Board seeds that belong to one recipe seed."""


class Material(NamedTuple):
    """What a Trainer needs besides its arguments."""

    reader: nn.Module
    """Takes a batch and gives its loss."""
    rows: Any
    """A map-style dataset."""
    collate: Callable[..., dict[str, Any]]
    """Rows to a batch."""


def learner_of(model: Any, stage: Stage) -> Any:
    """The model with what this stage lets learn, low-rank updates in place if it wants them."""
    learner = low_rank(model, stage.lora) if stage.lora else model
    let_learn(learner, stage.train, low_rank=bool(stage.lora))
    return learner


def finished(learner: Any, stage: Stage) -> Any:
    """The model after the stage: low-rank updates merged, all of it free to learn again."""
    model = learner.merge_and_unload() if stage.lora else learner
    model.requires_grad_(True)
    return model.eval()


def material(learner: Any, processor: Any, stage: Stage, seed: int) -> Material:
    """What the stage's data are, for this learner."""
    lesson = LESSONS[stage.data]
    pool = _pool(processor, _asks(stage, lesson), seed)
    return Material(lesson.reader(learner, processor), pool, pool.batch)


class Asks(NamedTuple):
    """Which boards and questions a stage learns from; the arguments of `board_pool`."""

    boards: int
    turns_each: int
    packed: float
    easy: bool
    fewest: int
    drawn: bool


def _asks(stage: Stage, lesson: Lesson) -> Asks:
    boards = min(stage.boards, stage.steps * stage.batch)
    asks = (boards, stage.questions, stage.packed, stage.easy)
    return Asks(*asks, fewest=lesson.fewest, drawn=lesson.drawn)


@lru_cache(maxsize=4)
def _pool(processor: TrolProcessor, asks: Asks, seed: int) -> BoardPool:
    # Cached, because both arms of a comparison learn from the same boards.
    return board_pool(processor, "train", first=seed * BOARD_SEEDS, **asks._asdict())
