"""What a recipe may say: names, bounds, and settings that exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trol.data import mixture_file
from trol.data.pairs import NAMES, is_pairs
from trol.depth.registry import from_settings
from trol.errors import UsageError, unknown
from trol.training.exit_loss import CURRICULA

if TYPE_CHECKING:
    from trol.training.recipe import Recipe, Stage

DATA = ("cells", "symbols", "boards")
"""What a stage can learn from by name: labelled cells, boards as words, pictures of boards."""

FILES = (".yaml", ".yml", ".jsonl", ".json")
"""Endings of the files that a stage can learn from: mixtures, and chats."""

PARTS = ("vision", "projector", "mixers", "decoder")
"""What a stage can train; all other parameters stay as they are."""

BITS = (0, 4, 8)
PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("linear", "cosine")

_STAGE_BOUNDS = {
    "steps": (0, 10**9),
    "epochs": (0.0, 1000.0),
    "batch": (1, 10**6),
    "accumulate": (1, 10**6),
    "max_tokens": (0, 10**7),
    "prompt_share": (0.0, 0.99),
    "boards": (1, 10**9),
    "questions": (1, 10**6),
    "learning_rate": (0.0, 10.0),
    "mixer_learning_rate": (0.0, 10.0),
    "muon": (0.0, 10.0),
    "packed": (0.0, 1.0),
    "warmup_steps": (0, 10**9),
    "decay": (0.0, 1.0),
    "exit_loss": (0.0, 1.0),
    "exit_every": (1, 10**6),
    "lora": (0, 4096),
    "lora_alpha": (0, 65536),
}
_RECIPE_BOUNDS = {"seed": (0, 2**32 - 1), "save_every": (0, 10**9), "keep": (1, 10**6)}
"""Setting -> least and greatest value."""


def check(recipe: Recipe) -> None:
    """Raises `UsageError` where a value is out of bounds, or settings exclude each other."""
    _check_bounds(recipe, _RECIPE_BOUNDS, "")
    _check_model(recipe)
    if recipe.bits not in BITS:
        raise UsageError(f"bits is {recipe.bits}; give 4, 8, or 0 for full weights.")
    if recipe.precision not in PRECISIONS:
        raise unknown("precision", recipe.precision, PRECISIONS)
    from_settings(recipe.policy)
    if not recipe.stages:
        raise UsageError("the recipe has no stage; give at least one.")
    for name, stage in recipe.stages.items():
        _check_stage(name, stage, recipe)
    _check_adapters(recipe)


def _check_model(recipe: Recipe) -> None:
    named = [key for key in ("preset", "host", "decoder") if getattr(recipe, key)]
    if len(named) != 1:
        raise UsageError(
            f"the recipe names {'both a ' + ' and a '.join(named) if named else 'no model'}; "
            "give one of preset (a new model that sees), decoder (a new one that reads) and host "
            "(an existing one)."
        )
    if recipe.decoder and recipe.bits:
        raise UsageError(
            f"bits is {recipe.bits}, but a new decoder has no weights worth quantising; give 0."
        )
    if recipe.chat_template and not recipe.host:
        raise UsageError("chat_template is for hosts; a new model has its own, leave it out.")


def _check_stage(name: str, stage: Stage, recipe: Recipe) -> None:
    where = f"stages.{name}"
    _check_bounds(stage, _STAGE_BOUNDS, f"{where}.")
    if (stage.steps > 0) == (stage.epochs > 0):
        raise UsageError(
            f"{where}.steps is {stage.steps} and epochs is {stage.epochs}; give 1 or more of the "
            "one and 0 of the other."
        )
    if stage.schedule not in SCHEDULES:
        raise unknown(f"schedule of stage {name}", stage.schedule, SCHEDULES)
    if not 0 <= stage.final_rate <= stage.learning_rate:
        raise UsageError(
            f"{where}.final_rate is {stage.final_rate}; give 0 to the learning rate, "
            f"{stage.learning_rate}."
        )
    if stage.batch % stage.accumulate:
        raise UsageError(
            f"{where}.batch is {stage.batch}, which {stage.accumulate} parts (accumulate) do not "
            "divide; give a multiple."
        )
    _check_data(name, stage)
    _check_exits(name, stage)
    for part in stage.train:
        if part not in PARTS:
            raise unknown(f"part to train in stage {name}", part, PARTS)
    if "mixers" in stage.train and recipe.policy.get("policy") == "router":
        raise UsageError(
            f"{where} trains mixers, but a router decides by 0 and 1 and gets no gradient; train "
            "it on an oracle's rows (trol.training.routing), and take mixers out of `train`."
        )
    if (stage.per_visit or stage.lora_alpha) and not stage.lora:
        raise UsageError(f"{where} has settings of low-rank updates, but lora is 0; give a rank.")
    if recipe.bits and not stage.lora and "decoder" in stage.train:
        raise UsageError(
            f"{where} trains the decoder, whose weights have {recipe.bits} bits and cannot learn; "
            f"give low-rank updates, {where}.lora=64, or bits=0."
        )


def _check_data(name: str, stage: Stage) -> None:
    pairs = is_pairs(stage.data)
    known = (*DATA, *mixture_file.names())
    if not pairs and stage.data not in known and Path(stage.data).suffix not in FILES:
        raise unknown(f"data of stage {name}", stage.data, (*known, *NAMES))
    if stage.prompt_share and not (pairs and stage.max_tokens):
        raise UsageError(
            f"stages.{name}.prompt_share is {stage.prompt_share}, a share of max_tokens "
            f"({stage.max_tokens}) for questions of pairs; give both for pairs, or leave it 0."
        )


def _check_exits(name: str, stage: Stage) -> None:
    if stage.exit_curriculum not in CURRICULA:
        raise unknown(f"exit_curriculum of stage {name}", stage.exit_curriculum, CURRICULA)
    if (stage.exit_curriculum != "none" or stage.exit_every > 1) and not stage.exit_loss:
        raise UsageError(
            f"stages.{name} says which exits learn, but exit_loss is 0; give 0.2, say."
        )
    if stage.exit_loss and stage.data == "cells":
        raise UsageError(
            f"stages.{name}.exit_loss is {stage.exit_loss}, but cells teach the vision tower and "
            "no decoder; set it to 0."
        )


def _check_adapters(recipe: Recipe) -> None:
    """Adapters hold no decoder: they can be opened on one that nobody trained before only."""
    stages = recipe.stages.items()
    whole = [n for n, s in stages if "decoder" in s.train and not s.lora]
    apart = [n for n, s in stages if s.lora and (s.per_visit or not s.merge)]
    if whole and apart:
        raise UsageError(
            f"stage {whole[0]} trains the decoder itself, but the updates of stage {apart[0]} are "
            "not merged, so the trained decoder would not be saved; merge them, or give both lora."
        )


def _check_bounds(settings: Any, bounds: Mapping[str, tuple[float, float]], where: str) -> None:
    for key, (least, most) in bounds.items():
        value = getattr(settings, key)
        if not least <= value <= most:  # a NaN is in no range
            limit = f"{least} or more" if most >= 10**6 else f"{least} to {most}"
            raise UsageError(f"{where}{key} is {value}; give {limit}.")
