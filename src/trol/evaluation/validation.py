"""What a training run is watched by: questions on validation boards, which no result is made of."""

from __future__ import annotations

from typing import Any

from trol.data.questions import chance_by_type
from trol.evaluation.tasks import board_items, by_type, score


def validate(model: Any, processor: Any, *, questions: int = 540) -> dict[str, Any]:
    """Accuracy in all and per question type: `{"accuracy", "n", "by_type", "chance_by_type"}`."""
    items = board_items(questions, seed=0, split="validation")
    return {**by_type(items, score(model, processor, items)), "chance_by_type": chance_by_type()}
