"""Training: recipes, and the run of their stages on transformers' Trainer.

Imports `evaluation`, `family` and every room below them.
"""

from trol.training.opening import reopened
from trol.training.recipe import Recipe, Stage, names, resolve
from trol.training.run import run

__all__ = ["Recipe", "Stage", "names", "reopened", "resolve", "run"]
