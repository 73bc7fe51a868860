"""Other evaluation harnesses: models for lm-eval and lmms-eval, and published tables beside runs.

May import training and everything below it. `lm_eval` and `lmms_eval` (of this room) are what the
harnesses load; `running` calls them; `suite` is the papers' sets.
"""

from trol.harness.packages import HARNESSES, check_harness
from trol.harness.running import run

__all__ = ["HARNESSES", "check_harness", "run"]
