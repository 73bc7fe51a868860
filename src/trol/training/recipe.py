"""Recipes: what is trained, stage by stage, as one short YAML file, and what it may say."""

import dataclasses
from collections.abc import Sequence
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
from trol.policies.mixer import from_nothing
from trol.strict import built, plain, read_yaml, setting

DATA = ("cells", "symbols", "captions", "boards")
"""What a stage can learn from by name: labelled cells, boards as words, pictures of boards and
questions about them, of which with captions the first asks for all cells."""

FILES = (".yaml", ".yml", ".jsonl", ".json")
"""Endings of the files that a stage can learn from: mixtures, and chats."""

PARTS = ("vision", "projector", "mixers", "decoder")
"""What a stage can train; all other parameters stay as they are."""

CURRICULA = ("none", "rotational", "gradual")
"""Which exits learn at a step: all; each `every`-th in turn; ever more of them, from the last."""


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: which parts learn, from what, how fast and how long."""

    train: tuple[str, ...] = field(metadata={"choices": PARTS})
    """Parts that learn; of these, layers that the policy lets no token in scope visit are
    frozen."""
    data: str
    """One of `trol.training.recipe.DATA`, a mixture (a YAML file or a carried name), a chat file
    (JSONL or JSON), or pairs: `docstrings`, `alpaca:FILE`, `cnn_dailymail:FILE`, `samsum:FILE`."""
    steps: int = setting(0, bounds=(0, 10**9))
    """Optimiser steps; 0 where `epochs` says how long."""
    epochs: float = setting(0.0, bounds=(0, 1000))
    """How often each conversation is seen; 0 where `steps` says how long."""
    batch: int = setting(32, bounds=(1, 10**6))
    """Conversations per optimiser step (for `cells`: boards)."""
    accumulate: int = setting(1, bounds=(1, 10**6))
    """Parts that a batch is computed in, one after another."""
    max_tokens: int = setting(0, bounds=(0, 10**7))
    """Longest conversation that is learnt from; 0 for no limit."""
    prompt_share: float = setting(0.0, bounds=(0, 0.99))
    """Most of `max_tokens` that the question of a pair may take: longer ones are cut, and answers
    to the rest; 0 for no cutting."""
    boards: int = setting(6000, bounds=(1, 10**9))
    """Number of boards; a longer stage sees each of them more than once."""
    questions: int = setting(6, bounds=(1, 10**6))
    """Questions about each board."""
    packed: float = setting(1.0, bounds=(0, 1))
    """Share of the boards whose questions do not see each other; other boards have one chat."""
    learning_rate: float = setting(1e-3, bounds=(0, 10))
    """Highest learning rate of AdamW."""
    mixer_learning_rate: float = setting(1e-4, bounds=(0, 10))
    """AdamW's rate for the mixers (published: 1e-4); a fast one closes the gates before the decoder
    has learnt what to do with a second visit."""
    muon: float = setting(0.0, bounds=(0, 10))
    """Muon's learning rate for the matrices inside decoder layers; 0 leaves them to AdamW."""
    warmup_steps: int = setting(20, bounds=(0, 10**9))
    """Steps in which the rates rise; at most a quarter of the stage."""
    schedule: str = setting("linear", choices=("linear", "cosine"))
    """`linear`: flat, then down to the final rate over `decay`; `cosine`: down all the way."""
    decay: float = setting(0.4, bounds=(0, 1))
    """Share of the steps over which a linear schedule falls at the end."""
    final_rate: float = 0.0
    """Where `learning_rate` ends; the other rates fall by the same share."""
    easy: bool = False
    """Whether only the first four types of question are asked."""
    traverse: bool = True
    """Whether the policy is in force; the plain model learns otherwise."""
    exit_loss: float = setting(0.0, bounds=(0, 1))
    """How much the outputs of earlier layers, read as if the last, count in the loss (LayerSkip:
    0.1 to 1); 0 for the last layer alone."""
    exit_curriculum: str = setting("none", choices=CURRICULA)
    """Which of these outputs learn at a step."""
    exit_every: int = setting(1, bounds=(1, 10**6))
    """Only each `exit_every`-th of these outputs learns."""
    lora: int = setting(0, bounds=(0, 4096))
    """Rank of low-rank updates that learn in place of the decoder's own matrices; 0 for none."""
    lora_alpha: int = setting(0, bounds=(0, 65536))
    """Updates are scaled by lora_alpha / lora; 0 for lora_alpha = lora."""
    lora_targets: tuple[str, ...] = ()
    """Linear maps that get updates, by the end of their names: `[q_proj, v_proj]`, or
    `[3.mlp.up_proj]` for that of layer 3 alone; none for all."""
    per_visit: bool = False
    """Whether second and later visits have a low-rank update of their own beside the first's."""
    merge: bool = True
    """Whether updates are merged when the stage is over; those of quantised weights never are."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run."""

    preset: dict[str, Any] = field(default_factory=dict)
    """A new model: the keyword arguments of `trol.family.tiny`; or the `vision` tower and `text`
    decoder that it is joined of (folders, short names or hub names), with `image_size` and
    `downsample_ratio`; or the `name` of a published size and the parts that it starts from."""
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
    """The depth policy that the model is made with; gates of new models start as published, those
    of hosts so that they change little (`initial_gate`)."""
    seed: int = setting(0, bounds=(0, 2**32 - 1))
    """Seed of the weights, the boards and their order."""
    bits: int = setting(0, choices=(0, 4, 8))
    """Bits of the decoder's quantised weights: 4 (nf4), 8 (int8), or 0 for full weights."""
    precision: str = setting("fp32", choices=("fp32", "bf16"))
    """Precision of the computation and of frozen weights."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass rather than kept."""
    save_every: int = setting(0, bounds=(0, 10**9))
    """Optimiser steps between checkpoints; 0 for none within a stage."""
    keep: int = setting(2, bounds=(1, 10**6))
    """Number of checkpoints that are kept."""
    stages: dict[str, Stage]
    """Stage name -> stage, in order."""

    def yaml(self) -> str:
        """The resolved recipe as YAML; reading it gives the same recipe."""
        return yaml.safe_dump(plain(dataclasses.asdict(self)), sort_keys=False, width=100)


def names() -> list[str]:
    """The recipes that come with trol."""
    return sorted(path.stem for path in _carried().glob("*.yaml"))


def resolve(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or a carried name, with dotted `key=value` overrides applied.

    Raises:
        UsageError: no such recipe, an unknown key ("did you mean"), a value of a wrong kind or
            out of bounds, or settings that exclude each other.
    """
    data = read_yaml(_file(recipe))
    for override in overrides:
        _apply(data, override)
    resolved: Recipe = built(Recipe, data, "recipe")
    if resolved.chat_template and resolved.chat_template not in TEMPLATES:
        # Its text, because the recipe may move away from the file.
        text = read_template(resolved.chat_template, tuple(TEMPLATES))
        resolved = dataclasses.replace(resolved, chat_template=text)
    if not resolved.host:
        resolved = dataclasses.replace(resolved, policy=from_nothing(resolved.policy))
    _check(resolved)
    return resolved


def _carried() -> Path:
    return Path(str(files("trol") / "recipes"))


def _file(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in str(recipe):
        raise UsageError(f"there is no recipe file {str(recipe)!r}; carried are {names()}.")
    if str(recipe) not in names():
        raise unknown("recipe", recipe, names())
    return _carried() / f"{recipe}.yaml"


def _apply(data: dict[str, Any], override: str) -> None:
    """Writes one `key.key=value` into a recipe's keys and values."""
    path, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"{override!r} is no override; write key=value, such as seed=1.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{override!r}: the value is no YAML: {error}") from error
    *outer, last = path.split(".")
    for level, key in enumerate(outer):
        if outer[0] == "stages" and level == 1 and key not in data:
            raise unknown("stage", key, data)
        inside = data.setdefault(key, {})
        if not isinstance(inside, dict):
            raise UsageError(f"{override!r}: {key!r} holds {inside!r}, nothing lies below it.")
        data = inside
    data[last] = value


def _check(recipe: Recipe) -> None:
    """Raises `UsageError` where settings of a recipe exclude each other."""
    models = [key for key in ("preset", "host", "decoder") if getattr(recipe, key)]
    if len(models) != 1:
        raise UsageError(
            f"the recipe names {'both a ' + ' and a '.join(models) if models else 'no model'}; "
            "give one of preset (a new model that sees), decoder (a new one that reads) and host "
            "(an existing one)."
        )
    if recipe.decoder and recipe.bits:
        raise UsageError(
            f"bits is {recipe.bits}, but a new decoder has no weights worth quantising; give 0."
        )
    if recipe.chat_template and not recipe.host:
        raise UsageError("chat_template is for hosts; a new model has its own, leave it out.")
    from_settings(recipe.policy)
    if not recipe.stages:
        raise UsageError("the recipe has no stage; give at least one.")
    for name, stage in recipe.stages.items():
        _check_stage(f"stages.{name}", stage)
        _check_parts(f"stages.{name}", stage, recipe)
    # Adapters hold no decoder: they can be opened on one that no stage has trained before only.
    stages = recipe.stages.items()
    whole = [n for n, s in stages if "decoder" in s.train and not s.lora]
    apart = [n for n, s in stages if s.lora and (s.per_visit or not s.merge)]
    if whole and apart:
        raise UsageError(
            f"stage {whole[0]} trains the decoder itself, but the updates of stage {apart[0]} are "
            "not merged, so the trained decoder would not be saved; merge them, or give both lora."
        )


def _check_stage(where: str, stage: Stage) -> None:
    """Raises `UsageError` where length, rates, data or exit loss of a stage are impossible."""
    if (stage.steps > 0) == (stage.epochs > 0):
        raise UsageError(
            f"{where}.steps is {stage.steps} and epochs is {stage.epochs}; give 1 or more of the "
            "one and 0 of the other."
        )
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
    pairs, known = is_pairs(stage.data), (*DATA, *mixture.names())
    if not pairs and stage.data not in known and Path(stage.data).suffix not in FILES:
        raise unknown(f"{where}.data", stage.data, (*known, *NAMES))
    if stage.prompt_share and not (pairs and stage.max_tokens):
        raise UsageError(
            f"{where}.prompt_share is {stage.prompt_share}, a share of max_tokens "
            f"({stage.max_tokens}) for questions of pairs; give both for pairs, or leave it 0."
        )
    if (stage.exit_curriculum != "none" or stage.exit_every > 1) and not stage.exit_loss:
        raise UsageError(f"{where} says which exits learn, but exit_loss is 0; give 0.2, say.")
    if stage.exit_loss and stage.data == "cells":
        raise UsageError(
            f"{where}.exit_loss is {stage.exit_loss}, but cells teach the vision tower and no "
            "decoder; set it to 0."
        )


def _check_parts(where: str, stage: Stage, recipe: Recipe) -> None:
    """Raises `UsageError` where the recipe's model cannot learn what the stage trains."""
    if "mixers" in stage.train and recipe.policy.get("policy") == "router":
        raise UsageError(
            f"{where} trains mixers, but a router decides by 0 and 1 and gets no gradient; train "
            "it on an oracle's rows (trol.training.routing), and take mixers out of `train`."
        )
    if (stage.per_visit or stage.lora_alpha or stage.lora_targets) and not stage.lora:
        raise UsageError(f"{where} has settings of low-rank updates, but lora is 0; give a rank.")
    if recipe.bits and not stage.lora and "decoder" in stage.train:
        raise UsageError(
            f"{where} trains the decoder, whose weights have {recipe.bits} bits and cannot learn; "
            f"give low-rank updates, {where}.lora=64, or bits=0."
        )
