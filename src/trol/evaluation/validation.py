"""What a training run is watched by: questions of validation splits, which no result is made of."""

from __future__ import annotations

from typing import Any

from trol.evaluation.measuring import measured
from trol.evaluation.tasks import questions_of


def validate(
    model: Any, processor: Any, *, questions: int = 540, task: str = "boards"
) -> dict[str, Any]:
    """What `trol.evaluation.evaluate` says of the task, on its validation split."""
    items = questions_of(model, processor, task, questions, seed=0, split="validation")
    return measured(model, processor, task, items)
