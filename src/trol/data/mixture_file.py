"""Mixture files: which sources are mixed, as one strict YAML file."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from trol.data.sources.formats import FORMATS
from trol.errors import UsageError, unknown


@dataclass(frozen=True)
class Source:
    """One source of a mixture; paths begin at the mixture's root."""

    name: str
    """The key that it stands under in the file."""
    path: str
    """A .jsonl or .json file, .parquet file(s) (`*` allowed), a folder that `datasets` opens, or
    the name of a dataset on the hub."""
    format: str = "messages"
    """How a row is laid out: one of `trol.data.sources.formats.FORMATS`."""
    images: str = "."
    """The folder that relative image paths begin at."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the format -> what it is called in this source."""
    placeholder: str = "<image>"
    """What stands in the texts for a picture."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """Column of the source -> patterns such as `ai2d/*`; rows that match none are no part of it."""
    unless: dict[str, list[str]] = field(default_factory=dict)
    """Column of the source -> patterns; rows that match one are no part of it."""
    split: str = "train"
    """Split of a `datasets` table."""
    subset: str | None = None
    """Subset (configuration) of a `datasets` table that has several."""
    weight: float = 1.0
    """How often a row comes in an epoch; 0.1 takes a tenth of the rows, always the same."""
    count: int | None = None
    """How many rows there should be; `trol data check` reports another number."""
    allow_urls: bool = False
    """Whether pictures are fetched from http(s) addresses."""

    def passes(self, row: Mapping[str, Any]) -> bool:
        """Whether the row belongs to the source: any `where` pattern, and no `unless` pattern."""
        wanted = all(_matches(row, column, globs) for column, globs in self.where.items())
        return wanted and not any(_matches(row, column, g) for column, g in self.unless.items())

    def reading(self) -> dict[str, Any]:
        """The settings that decide which rows there are and how they are read."""
        deciding = ("format", "columns", "placeholder", "where", "unless")
        return {key: value for key, value in asdict(self).items() if key in deciding}


@dataclass(frozen=True)
class MixtureFile:
    """What a mixture file says."""

    path: Path
    """The file itself."""
    root: Path
    """The folder that all paths in it begin at."""
    sources: tuple[Source, ...]


CHATS = (".json", ".jsonl")
"""Ends of chat files, each of which is a mixture of itself alone."""


def read_mixture(mixture: str | Path, *, root: Path | None = None) -> MixtureFile:
    """The mixture of a YAML file or a carried name; `root` replaces the file's own.

    The root of a carried mixture is the current folder unless given.

    Raises:
        UsageError: no such mixture, an unknown key ("did you mean"), or a value of a wrong kind.
    """
    path = _found(mixture)
    if path.suffix in CHATS:
        return MixtureFile(path, root or path.parent, (Source(name=path.stem, path=path.name),))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as broken:
        raise UsageError(f"{path} is no YAML: {broken}") from broken
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds {type(data).__name__}, not the keys root and sources.")
    for key in data:
        if key not in ("root", "sources"):
            raise unknown(f"key in {path.name}", key, ("root", "sources"))
    sources = data.get("sources")
    if not isinstance(sources, dict) or not sources:
        raise UsageError(f"{path} names no sources; list them under `sources`, each by a name.")
    if root is None:
        root = Path() if path.parent == _carried() else path.parent / str(data.get("root", "."))
    return MixtureFile(path, root, tuple(_source(str(n), row) for n, row in sources.items()))


def names() -> list[str]:
    """The mixtures that trol carries."""
    return sorted(path.stem for path in _carried().glob("*.yaml"))


def _carried() -> Path:
    return Path(str(files("trol") / "recipes" / "mixtures"))


def _found(mixture: str | Path) -> Path:
    path = Path(mixture)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml", *CHATS) or len(path.parts) > 1:
        raise UsageError(
            f"there is no file {str(mixture)!r} to read conversations from; give a mixture or a "
            f"chat file (in a recipe: stages.NAME.data=FILE). Carried mixtures: {names()}."
        )
    if str(mixture) not in names():
        raise unknown("mixture", mixture, names())
    return _carried() / f"{mixture}.yaml"


def _source(name: str, row: Any) -> Source:
    if not isinstance(row, Mapping):
        raise UsageError(f"the source {name} holds {row!r}; give keys and values, path first.")
    hints = {key: hint for key, hint in typing.get_type_hints(Source).items() if key != "name"}
    for key in row:
        if key not in hints:
            raise unknown(f"key in the source {name}", key, hints)
    required = {f.name for f in fields(Source) if _is_required(f)} - {"name"}
    if missing := sorted(required - set(row)):
        raise UsageError(f"the source {name} lacks {', '.join(missing)}.")
    given = {key: _typed(hints[key], value, f"{name}.{key}") for key, value in row.items()}
    source = Source(name, **given)
    if source.format not in FORMATS:
        raise unknown(f"format of {name}", source.format, FORMATS)
    for column in source.columns:
        if column not in FORMATS[source.format].columns:
            raise unknown(f"column of {source.format}", column, FORMATS[source.format].columns)
    if not 0 < source.weight <= 1000:
        raise UsageError(f"{name}.weight is {source.weight}; give a number above 0, at most 1000.")
    if not source.placeholder:
        raise UsageError(f"{name}.placeholder is empty; give what stands for a picture.")
    return source


def _is_required(of: Any) -> bool:
    return of.default is MISSING and of.default_factory is MISSING


_KINDS = {
    dict[str, str]: "names and names, such as {instruction: question}",
    dict[str, list[str]]: "columns and lists of patterns, such as {image: [ai2d/*]}",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def _typed(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not _is(kind, value):
        raise UsageError(f"{where} is {value!r}, but must be {_KINDS[kind]}.")
    return value


def _is(kind: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        return isinstance(value, dict) and all(
            isinstance(k, str) and _is(inner, v) for k, v in value.items()
        )
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return isinstance(value, kind)


def _matches(row: Mapping[str, Any], column: str, globs: list[str]) -> bool:
    """Whether the column's text, or the first of its texts, matches any pattern."""
    value = row.get(column)
    text = value[0] if isinstance(value, list) and value else value
    return isinstance(text, str) and any(fnmatchcase(text, glob) for glob in globs)
