"""Recipes: what is trained, stage by stage, as one short YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from trol.data.templates import read_template
from trol.errors import UsageError, unknown
from trol.family.text_decoder import TEMPLATES
from trol.training.checking import check
from trol.training.strict import built, plain


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: who learns, from what, how fast and how long."""

    train: tuple[str, ...]
    """Parts that learn, among `trol.training.checking.PARTS`; of these, layers that the policy lets
    no token in scope visit are frozen."""
    data: str
    """One of `trol.training.checking.DATA`, a mixture (a YAML file or a carried name), a chat file
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
    `trol.family.text_decoder.text_decoder` and `vocabulary`, the tokens of its tokenizer."""
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
