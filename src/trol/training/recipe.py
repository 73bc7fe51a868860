"""Recipes: what is trained, stage by stage, as one short YAML file.

What a recipe may say: names, bounds, and settings that exclude each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from trol.data import mixture
from trol.data.conversations import read_template
from trol.data.pairs import NAMES, is_pairs
from trol.depth.policy import from_settings
from trol.errors import UsageError, unknown
from trol.family.presets import TEMPLATES
from trol.strict import built, plain
from trol.training.losses import CURRICULA

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
    known = (*DATA, *mixture.names())
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


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: who learns, from what, how fast and how long."""

    train: tuple[str, ...]
    """Parts that learn, among `trol.training.recipe.PARTS`; of these, layers that the policy lets
    no token in scope visit are frozen."""
    data: str
    """One of `trol.training.recipe.DATA`, a mixture (a YAML file or a carried name), a chat file
    (JSONL or JSON), or pairs: `docstrings`, `alpaca:FILE`, `cnn_dailymail:FILE`, `samsum:FILE`."""
    steps: int = 0
    """Optimiser steps; 0 where `epochs` says how long."""
    epochs: float = 0.0
    """How often each conversation is seen; 0 where `steps` says how long."""
    batch: int = 32
    """Conversations per optimiser step (for `cells`: boards)."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    max_tokens: int = 0
    """Longest conversation that is learnt from; 0 for no limit."""
    prompt_share: float = 0.0
    """Most of `max_tokens` that the question of a pair may take: longer ones are cut, and answers
    to the rest; 0 for no cutting."""
    boards: int = 6000
    """Boards that are made; a longer stage sees each of them more than once."""
    questions: int = 6
    """Questions about each board."""
    packed: float = 1.0
    """Share of the boards whose questions do not see each other; turns of one chat elsewhere."""
    learning_rate: float = 1e-3
    """AdamW's, at its highest."""
    mixer_learning_rate: float = 1e-4
    """AdamW's for the mixers (published: 1e-4); a fast one closes the gates before the decoder
    has learnt what to do with a second visit."""
    muon: float = 0.0
    """Muon's learning rate for the matrices inside decoder layers; 0 leaves them to AdamW."""
    warmup_steps: int = 20
    """Steps in which the rates rise; at most a quarter of the stage."""
    schedule: str = "linear"
    """`linear`: flat, then down to the final rate over `decay`; `cosine`: down all the way."""
    decay: float = 0.4
    """Share of the steps over which a linear schedule falls at the end."""
    final_rate: float = 0.0
    """Where `learning_rate` ends; the other rates fall by the same share."""
    easy: bool = False
    """Whether only the first four types of question are asked."""
    traverse: bool = True
    """Whether the policy is in force; the plain model learns otherwise."""
    exit_loss: float = 0.0
    """How much the outputs of earlier layers, read as if the last, count in the loss (LayerSkip:
    0.1 to 1); 0 for the last layer alone."""
    exit_curriculum: str = "none"
    """Which of them learn at a step: `none`, `rotational` or `gradual`."""
    exit_every: int = 1
    """Every how many-th of them learns."""
    lora: int = 0
    """Rank of low-rank updates that learn in place of the decoder's own matrices; 0 for none."""
    lora_alpha: int = 0
    """Updates are scaled by lora_alpha / lora; 0 for lora_alpha = lora."""
    per_visit: bool = False
    """Whether second and later visits have a low-rank update of their own beside the first's."""
    merge: bool = True
    """Whether updates are merged when the stage is over; those of quantised weights never are."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run."""

    preset: dict[str, Any] = field(default_factory=dict)
    """A new model: the keyword arguments of `trol.family.tiny`, or the `name` of a published
    size with folders or hub names of the `vision` tower and `text` decoder that it starts from."""
    host: str = ""
    """In place of `preset`, an existing model that the policy is attached to: folder or hub name
    of a vision-language model or a text decoder."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """In place of `preset` and `host`, a new text decoder: the keyword arguments of
    `trol.family.presets.text_decoder` and `vocabulary`, the tokens of its tokenizer."""
    chat_template: str = ""
    """`separated` gives a host Glavas et al.'s form, BOS user <SEP> assistant EOS; a file, or text
    in Jinja, another template; empty for the host's own."""
    policy: dict[str, Any] = field(default_factory=lambda: {"policy": "trol_mixer"})
    """The depth policy that the model is made with."""
    seed: int = 0
    """Of the weights, the boards and their order."""
    bits: int = 0
    """Of the decoder's quantised weights: 4 (nf4), 8 (int8), or 0 for full ones."""
    precision: str = "fp32"
    """What is computed in, and what frozen weights are kept in: fp32 or bf16."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass rather than kept."""
    save_every: int = 0
    """Optimiser steps between checkpoints; 0 for none within a stage."""
    keep: int = 2
    """Checkpoints that are kept."""
    stages: dict[str, Stage]
    """Stage name -> stage, in order."""

    def yaml(self) -> str:
        """The resolved recipe as YAML; reading it gives the same recipe."""
        return yaml.safe_dump(plain(dataclasses.asdict(self)), sort_keys=False, width=100)

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages together."""
        return sum(stage.steps for stage in self.stages.values())


def names() -> list[str]:
    """The recipes that trol carries."""
    return sorted(path.name[:-5] for path in _carried().iterdir() if path.name.endswith(".yaml"))


def resolve(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or a carried name, with dotted `key=value` overrides applied.

    Raises:
        UsageError: no such recipe, an unknown key ("did you mean"), or a value of a wrong kind.
    """
    data = _read(recipe)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"{override!r} is no override; write key=value, such as seed=1.")
        _set(data, key.split("."), _value(value, override), override)
    made = built(Recipe, data, "recipe")
    if made.chat_template and made.chat_template not in TEMPLATES:  # the recipe may move away
        text = read_template(made.chat_template, tuple(TEMPLATES))
        made = dataclasses.replace(made, chat_template=text)
    check(made)
    return made


def _carried() -> Any:
    return files("trol") / "recipes"


def _read(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if path.is_file():
        text = _text(path)
    elif path.suffix in (".yaml", ".yml") or "/" in str(recipe):
        raise UsageError(f"there is no recipe file {str(recipe)!r}; carried are {names()}.")
    elif str(recipe) in names():
        text = (_carried() / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown("recipe", recipe, names())
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{recipe} is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{recipe} holds {type(data).__name__}, not keys and values.")
    return data


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no YAML: it is not text.") from error


def _set(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(path[:-1]):
        if path[0] == "stages" and depth == 1 and key not in data:
            raise unknown("stage", key, data)
        inside = data.setdefault(key, {})
        if not isinstance(inside, dict):
            raise UsageError(f"{override!r}: {key!r} holds {inside!r}, nothing lies below it.")
        data = inside
    data[path[-1]] = value


def _value(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{override!r}: the value is no YAML: {error}") from error
