"""Recipes: what is trained, stage by stage, as one short YAML file."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from trol.depth.registry import from_settings
from trol.errors import UsageError, unknown

DATA = ("cells", "symbols", "boards")
"""What a stage can learn from: labelled cells, boards as words, pictures of boards."""

PARTS = ("vision", "projector", "mixers", "decoder")
"""What a stage can train; all other parameters stay as they are."""


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: who learns, from what, how fast and how long."""

    train: tuple[str, ...]
    """Parts that learn, among `PARTS`."""
    data: str
    """One of `DATA`."""
    steps: int
    """Optimiser steps."""
    batch: int = 32
    """Conversations per step (for `cells`: boards)."""
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
    decay: float = 0.4
    """Share of the steps over which the learning rate falls to zero at the end."""
    easy: bool = False
    """Whether only the first four types of question are asked."""
    traverse: bool = True
    """Whether the policy is in force; the plain model learns otherwise."""
    lora: int = 0
    """Rank of low-rank updates that learn in place of the decoder's own matrices; 0 for none."""


@dataclass(frozen=True)
class Recipe:
    """A whole training run."""

    preset: dict[str, Any]
    """Sizes of the model: the keyword arguments of `trol.family.tiny`."""
    stages: dict[str, Stage]
    """Stage name -> stage, in order."""
    policy: dict[str, Any] = field(default_factory=lambda: {"policy": "trol_mixer"})
    """The depth policy that the model is made with."""
    seed: int = 0
    """Of the weights, the boards and their order."""

    def yaml(self) -> str:
        """The resolved recipe as YAML; reading it gives the same recipe."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False, width=100)

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
    made = _build(Recipe, data, "recipe")
    _check(made)
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


def _build(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} holds {data!r}; give keys and values.")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise unknown(f"key in {where}", key, hints)
    required = {f.name for f in dataclasses.fields(cls) if _is_required(f)}
    if missing := sorted(required - set(data)):
        raise UsageError(f"{where} lacks {', '.join(missing)}.")
    return cls(**{key: _typed(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _is_required(field_: Any) -> bool:
    return field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING


def _typed(kind: Any, value: Any, where: str) -> Any:
    if kind == dict[str, Stage]:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} holds {value!r}; name stages, each with its settings.")
        return {str(name): _build(Stage, row, f"{where}.{name}") for name, row in value.items()}
    if kind == tuple[str, ...]:
        kind, value = tuple, tuple(value) if isinstance(value, list) else value
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _number(value, where)  # YAML 1.1 reads 1e-3 as a string
    origin = typing.get_origin(kind) or kind
    if (
        origin is types.UnionType
        or not isinstance(value, origin)
        or (isinstance(value, bool) and origin is not bool)
    ):
        raise UsageError(f"{where} is {value!r}, but must be {_KINDS.get(origin, str(kind))}.")
    return value


_KINDS = {
    tuple: "a list, such as [decoder]",
    dict: "keys and values, such as {policy: plain}",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
}


def _number(value: int | str, where: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"{where} is {value!r}, but must be a number.") from error


_BOUNDS = {
    "learning_rate": (0.0, 10.0),
    "mixer_learning_rate": (0.0, 10.0),
    "muon": (0.0, 10.0),
    "packed": (0.0, 1.0),
    "decay": (0.0, 1.0),
    "lora": (0, 4096),
}
"""Stage setting -> least and greatest value."""


def _check(recipe: Recipe) -> None:
    if not recipe.stages:
        raise UsageError("the recipe has no stage; give at least one.")
    if recipe.seed < 0:
        raise UsageError(f"seed is {recipe.seed}; give 0 or more.")
    from_settings(recipe.policy)
    for name, stage in recipe.stages.items():
        for key, (least, most) in _BOUNDS.items():
            if not least <= getattr(stage, key) <= most:  # a NaN is in no range
                raise UsageError(
                    f"stages.{name}.{key} is {getattr(stage, key)}; give {least} to {most}."
                )
        if stage.data not in DATA:
            raise unknown(f"data of stage {name}", stage.data, DATA)
        for part in stage.train:
            if part not in PARTS:
                raise unknown(f"part to train in stage {name}", part, PARTS)
        for key in ("steps", "batch", "boards", "questions"):
            if getattr(stage, key) < 1:
                raise UsageError(f"stages.{name}.{key} is {getattr(stage, key)}; give 1 or more.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
