"""Evaluation: tasks, curves and benchmarks."""

from trol.evaluation.measuring import evaluate
from trol.evaluation.tasks import check_tasks, sample_questions

__all__ = ["check_tasks", "evaluate", "sample_questions"]
