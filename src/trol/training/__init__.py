"""Training: recipes, the stage table, and the run on transformers' Trainer."""

from trol.training.opening import reopened
from trol.training.recipe import Recipe, Stage, names, resolve
from trol.training.run import run

__all__ = ["Recipe", "Stage", "names", "reopened", "resolve", "run"]
