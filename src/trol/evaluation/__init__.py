"""Measuring models: tasks, curves, the oracle, calibration and searched plans.

May import everything below training: errors, files, host, execution, depth, policies, speculation,
checkpoints, data and family.
"""

from trol.evaluation.items import sample_questions
from trol.evaluation.tasks import check_tasks, evaluate

__all__ = ["check_tasks", "evaluate", "sample_questions"]
