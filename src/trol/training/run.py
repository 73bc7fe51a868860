"""Running a recipe: its stages one after another, each on transformers' Trainer."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from trol.errors import UsageError
from trol.training.opening import opened
from trol.training.progress import Progress
from trol.training.recipe import Recipe, Stage
from trol.training.stage import train_stage


def run(
    recipe: Recipe,
    out: Path,
    *,
    start: Path | None = None,
    only: Sequence[str] | None = None,
    label: str = "",
) -> dict[str, Any]:
    """Trains the recipe's stages and saves model, processor, recipe and losses in `out`.

    Args:
        recipe: what to train.
        out: the folder to save in; nothing is written before training is over.
        start: the folder of an earlier run to go on from, in place of a new model.
        only: names of the stages to run; all if None.
        label: goes in front of each line of progress.

    Returns:
        `{"model", "seed", "losses": {stage: {"steps", "losses"}}, "parameters", "steps",
        "seconds": {stage: s}}`.

    Raises:
        UsageError: `only` names a stage that the recipe does not have.
    """
    stages = _chosen(recipe, only)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{str(out)!r} is a file; name a folder to save the model in.")
    set_seed(recipe.seed)
    model, processor = opened(recipe, start)
    found: dict[str, Any] = {"losses": {}, "seconds": {}}
    for name, stage in stages.items():
        began = time.perf_counter()
        model, found["losses"][name] = train_stage(
            model, processor, stage, recipe.seed, Progress(f"{label}{name}", stage.steps)
        )
        found["seconds"][name] = round(time.perf_counter() - began, 1)
    found |= {
        "model": str(out),
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": sum(stage.steps for stage in stages.values()),
    }
    _save(model, processor, recipe, found, out)
    return found


def _chosen(recipe: Recipe, only: Sequence[str] | None) -> dict[str, Stage]:
    names = list(recipe.stages) if only is None else list(only)
    for name in names:
        if name not in recipe.stages:
            raise UsageError(f"the recipe has no stage {name!r}, but {', '.join(recipe.stages)}.")
    return {name: recipe.stages[name] for name in names}


def _save(model: Any, processor: Any, recipe: Recipe, found: dict[str, Any], out: Path) -> None:
    """Writes everything into a folder beside `out`, then moves it into place."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / "recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    told = {key: value for key, value in found.items() if key != "model"}  # folders move
    (partial / "training.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
