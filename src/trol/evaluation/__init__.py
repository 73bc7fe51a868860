"""Evaluation: tasks, curves and benchmarks."""

from trol.evaluation.items import sample_questions
from trol.evaluation.measuring import evaluate
from trol.evaluation.tasks import check_tasks

__all__ = ["check_tasks", "evaluate", "sample_questions"]
