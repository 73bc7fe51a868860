"""Opening what a recipe trains: a new model of a preset, or one of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from trol.data.boards import make_board
from trol.data.questions import questions
from trol.errors import UsageError
from trol.family import TrolForConditionalGeneration, TrolProcessor, tiny, tiny_processor
from trol.training.recipe import Recipe
from trol.training.stages import NOTHING


def opened(recipe: Recipe, start: Path | None) -> tuple[Any, TrolProcessor]:
    """The model and its processor; `UsageError` where none can be made of the recipe's sizes."""
    if start is None:
        processor = tiny_processor(_texts())
        try:
            config = tiny(len(processor.tokenizer), **recipe.preset, depth=recipe.policy)
            return TrolForConditionalGeneration(config), processor
        except (StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UsageError(
                f"no model can be made from preset {recipe.preset}: {error}"
            ) from error
    processor = TrolProcessor.from_pretrained(start)
    model = TrolForConditionalGeneration.from_pretrained(start, depth=recipe.policy)
    return model, processor


def _texts() -> list[str]:
    """All words that the boards' questions and answers use."""
    asked = [q for seed in range(400) for q in questions(make_board("train", seed), 9)]
    return [NOTHING, *(q.text for q in asked), *(q.answer for q in asked)]
