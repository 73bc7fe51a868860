"""Mixture files: which sources are mixed, as one strict YAML file.

Quarantine lists: rows that a check has found damaged, which training skips and counts.

One JSON object per line: first the size of each source's files, then source, row, reason and
detail of each damaged row. The sizes tell whether the list still speaks of the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from trol.data.formats import FORMATS, KINDS
from trol.data.row_files import cache_folder, whole_file
from trol.errors import DataError, UsageError, unknown
from trol.strict import built, read_yaml, setting


@dataclass(frozen=True)
class Source:
    """One source of a mixture; paths begin at the mixture's root."""

    name: str
    """The key that it stands under in the file."""
    path: str
    """A .jsonl or .json file, .parquet file(s) (`*` allowed), a folder that `datasets` opens, or
    the name of a dataset on the hub."""
    format: str = setting("messages", choices=tuple(FORMATS))
    """How a row is laid out."""
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
    data = read_yaml(path)
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
    where = f"sources.{name}"
    source = built(Source, row, where, name=name)
    for column in source.columns:
        if column not in FORMATS[source.format].columns:
            raise unknown(f"column of {source.format}", column, FORMATS[source.format].columns)
    if not 0 < source.weight <= 1000:
        raise UsageError(f"{where}.weight is {source.weight}; give above 0, at most 1000.")
    if not source.placeholder:
        raise UsageError(f"{where}.placeholder is empty; give what stands for a picture.")
    return source


def _matches(row: Mapping[str, Any], column: str, globs: list[str]) -> bool:
    """Whether the column's text, or the first of its texts, matches any pattern."""
    value = row.get(column)
    text = value[0] if isinstance(value, list) and value else value
    return isinstance(text, str) and any(fnmatchcase(text, glob) for glob in globs)


@dataclass(frozen=True)
class Damaged:
    """One row that cannot be trained on."""

    source: str
    row: int
    """Its number in the source, from 0."""
    reason: str
    """One of `trol.data.formats.KINDS`."""
    detail: str
    """What exactly is wrong, and what to do."""


def write_quarantine(path: Path, sizes: Mapping[str, int], damaged: Iterable[Damaged]) -> None:
    """Writes the list, whole or not at all; `sizes` are the bytes of each source's files."""
    with whole_file(path) as file:
        file.write(json.dumps({"sizes": dict(sizes)}) + "\n")
        file.writelines(json.dumps(asdict(one)) + "\n" for one in damaged)


def read_quarantine(path: Path, sizes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Source -> row -> reason; nothing where there is no such file.

    Raises:
        DataError: the list is damaged, or was made for files of other sizes.
    """
    if not path.exists():
        return {}
    listed: dict[str, dict[int, str]] = {}
    with path.open(encoding="utf-8") as lines:
        try:
            known = json.loads(next(lines))["sizes"]
            for line in lines:
                one = Damaged(**json.loads(line))
                listed.setdefault(one.source, {})[int(one.row)] = one.reason
        except (ValueError, TypeError, KeyError, StopIteration) as broken:
            raise _stale(path, "is no quarantine list") from broken
    for source, size in sizes.items():
        if source in known and known[source] != size:
            raise _stale(path, f"was written when {source} had another size")
    if odd := {reason for rows in listed.values() for reason in rows.values()} - set(KINDS):
        raise _stale(path, f"has the unknown reason {sorted(odd)[0]!r}")
    return listed


def quarantine_path(described: MixtureFile) -> Path:
    """Where a mixture's quarantine list lies unless another is named.

    One that lies beside the data is theirs, whoever put it there; or else it is in trol's cache,
    by the mixture's file and root, so that data may lie where nobody but their owner writes.
    """
    beside = described.root / f"{described.path.stem}.quarantine.jsonl"
    if beside.exists():
        return beside
    places = f"{described.path.resolve()}\n{described.root.resolve()}"
    mark = hashlib.sha256(places.encode()).hexdigest()[:16]
    return cache_folder() / "quarantine" / f"{described.path.stem}-{mark}.jsonl"


def _stale(path: Path, why: str) -> DataError:
    return DataError(f"{path} {why}; delete it and run `trol data check` again.")
