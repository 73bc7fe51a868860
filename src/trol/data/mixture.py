"""Mixtures: the conversations of many sources under one numbering, read from disk one by one.

One strict YAML file says which sources are mixed. A quarantine list names the rows that a check
has found damaged, which training skips and counts: one JSON object per line, first the size of
each source's files, then source, row, reason and detail of each damaged row. A list is refused
where the sizes are no longer those of the files.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from trol.data.formats import FORMATS, KINDS, Messages, RowError, read_row, row_errors
from trol.data.images import open_picture
from trol.data.row_files import JSON_FILES, Container, Table
from trol.errors import DataError, UsageError, unknown
from trol.files import cache_folder, whole_file
from trol.strict import built, read_yaml


@dataclass(frozen=True)
class Source:
    """One source of a mixture; paths begin at the mixture's root."""

    name: str
    """Its key in the file."""
    path: str
    """A .jsonl or .json file, .parquet file(s) (`*` allowed), a folder that `datasets` opens, or
    the name of a dataset on the hub."""
    format: str = "messages"
    """Format of the rows: one of `trol.data.formats.FORMATS`."""
    images: str = "."
    """The folder that relative image paths begin at."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the format -> its name in this source."""
    placeholder: str = "<image>"
    """Marks the place of a picture in the texts."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """Column of the source -> patterns such as `ai2d/*`; rows that match none are left out."""
    unless: dict[str, list[str]] = field(default_factory=dict)
    """Column of the source -> patterns; rows that match one are left out."""
    split: str = "train"
    """Split of a `datasets` table."""
    subset: str | None = None
    """Subset (configuration) of a `datasets` table that has several."""
    weight: float = 1.0
    """Times that a row comes in an epoch; 0.1 takes a tenth of the rows, always the same."""
    count: int | None = None
    """Expected number of sound rows; `trol data check` reports another number."""
    allow_urls: bool = False
    """Whether pictures are fetched from http(s) addresses."""

    def __post_init__(self) -> None:
        where = f"sources.{self.name}"
        if self.format not in FORMATS:
            raise unknown(f"{where}.format", self.format, FORMATS)
        for column in self.columns:
            if column not in FORMATS[self.format].columns:
                raise unknown(f"column of {self.format}", column, FORMATS[self.format].columns)
        if not 0 < self.weight <= 1000:
            raise UsageError(
                f"{where}.weight is {self.weight}; give a number above 0, at most 1000."
            )
        if not self.placeholder:
            raise UsageError(f"{where}.placeholder is empty; give the mark of a picture's place.")

    def passes(self, row: Mapping[str, Any]) -> bool:
        """Whether the row belongs to the source: any `where` pattern, and no `unless` pattern."""
        chosen = all(_matches(row, column, globs) for column, globs in self.where.items())
        return chosen and not any(_matches(row, column, g) for column, g in self.unless.items())

    def read(self, row: Mapping[str, Any]) -> Messages:
        """The row's messages; `RowError` where they are not of the source's format."""
        return read_row(row, self.format, self.columns, self.placeholder)


@dataclass(frozen=True)
class MixtureFile:
    """The content of a mixture file."""

    path: Path
    root: Path
    """The folder that all paths in the file begin at."""
    sources: tuple[Source, ...]


def read_mixture(mixture: str | Path, *, root: Path | None = None) -> MixtureFile:
    """The mixture of a YAML file, a chat file or a bundled name; `root` replaces the file's own.

    The root of a bundled mixture is the current folder by default.

    Raises:
        UsageError: no such mixture, an unknown key ("did you mean"), or a value of a wrong kind.
    """
    path = _file_of(mixture)
    if path.suffix in JSON_FILES:
        return MixtureFile(path, root or path.parent, (Source(name=path.stem, path=path.name),))
    data = read_yaml(path)
    for key in data:
        if key not in ("root", "sources"):
            raise unknown(f"key in {path.name}", key, ("root", "sources"))
    sources = data.get("sources")
    if not isinstance(sources, dict) or not sources:
        raise UsageError(f"{path} names no sources; list them under `sources`, each by a name.")
    if root is None:
        root = Path() if path.parent == _bundled() else path.parent / str(data.get("root", "."))
    sources = [built(Source, row, f"sources.{n}", name=str(n)) for n, row in sources.items()]
    return MixtureFile(path, root, tuple(sources))


def names() -> list[str]:
    """The mixtures that come with trol."""
    return sorted(path.stem for path in _bundled().glob("*.yaml"))


def _bundled() -> Path:
    return Path(str(files("trol") / "recipes" / "mixtures"))


def _file_of(mixture: str | Path) -> Path:
    path = Path(mixture)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml", *JSON_FILES) or len(path.parts) > 1:
        raise UsageError(
            f"there is no file {str(mixture)!r} to read conversations from; give a mixture or a "
            f"chat file (in a recipe: stages.NAME.data=FILE). Bundled mixtures: {names()}."
        )
    if str(mixture) not in names():
        raise unknown("mixture", mixture, names())
    return _bundled() / f"{mixture}.yaml"


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
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"sizes": dict(sizes)}) + "\n")
        file.writelines(json.dumps(asdict(one)) + "\n" for one in damaged)


def read_quarantine(path: Path, sizes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Source -> row -> reason; empty where there is no such file.

    Raises:
        DataError: the list is damaged, or was made for files of other sizes.
    """
    if not path.exists():
        return {}
    reasons: dict[str, dict[int, str]] = {}
    with path.open(encoding="utf-8") as lines:
        try:
            sizes_then = json.loads(next(lines))["sizes"]
            for line in lines:
                one = Damaged(**json.loads(line))
                reasons.setdefault(one.source, {})[int(one.row)] = one.reason
        except (ValueError, TypeError, KeyError, StopIteration) as broken:
            raise _stale(path, "is no quarantine list") from broken
    for source, size in sizes.items():
        if sizes_then.get(source, size) != size:
            raise _stale(path, f"was written when {source} had another size")
    if strange := {reason for rows in reasons.values() for reason in rows.values()} - set(KINDS):
        raise _stale(path, f"has the unknown reason {min(strange)!r}")
    return reasons


def quarantine_path(mixture: MixtureFile) -> Path:
    """The default place of a mixture's quarantine list.

    A list beside the data is used where there is one. Otherwise it is kept in trol's cache, named
    by the mixture's file and root, because the data's folder may be read-only.
    """
    beside = mixture.root / f"{mixture.path.stem}.quarantine.jsonl"
    if beside.exists():
        return beside
    places = f"{mixture.path.resolve()}\n{mixture.root.resolve()}"
    mark = hashlib.sha256(places.encode()).hexdigest()[:16]
    return cache_folder() / "quarantine" / f"{mixture.path.stem}-{mark}.jsonl"


def _stale(path: Path, why: str) -> DataError:
    return DataError(f"{path} {why}; delete it and run `trol data check` again.")


ENTRY = np.dtype([("row", "i8"), ("start", "i8"), ("end", "i8"), ("images", "i2")])
"""Of a row: its number in the source, first byte (number, in a table) and end, and its pictures."""

INDEX_VERSION = 2
"""An index of another version is not used."""

INDEX_SETTINGS = ("format", "columns", "placeholder", "where", "unless")
"""Settings of a source that decide which rows it has and how they are read."""


def indexed(container: Container, source: Source, folder: Path) -> np.ndarray:
    """The index kept in `folder`, or a new one if files or settings have changed. Shape: [R]."""
    settings = [getattr(source, name) for name in INDEX_SETTINGS]
    states = [
        (str(path.resolve()), (status := path.stat()).st_size, status.st_mtime_ns)
        for path in container.files
    ]
    key = json.dumps([INDEX_VERSION, states, settings])
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    index = np.fromiter(_entries(container, source), ENTRY)
    with whole_file(file) as draft, draft.open("wb") as stream:
        np.save(stream, index)
    return index


def _entries(container: Container, source: Source) -> Iterator[tuple[int, int, int, int]]:
    """An entry for each row from one reading, also for damaged ones, which the check will name."""
    for number, (start, end, row) in enumerate(container.rows()):
        if isinstance(row, RowError):
            yield number, start, end, 0
        elif source.passes(row):
            images = 0
            with suppress(RowError):
                parts = (part for message in source.read(row) for part in message["content"])
                images = sum(part["type"] == "image" for part in parts)
            yield number, start, end, images


@dataclass(frozen=True)
class Part:
    """One source of an opened mixture; its rows have places 0 .. len(index) - 1."""

    source: Source
    container: Container
    images: Path
    """The folder that relative image paths begin at."""
    index: np.ndarray
    """The rows that the source's filter lets through, damaged ones too. Shape: [R], `ENTRY`."""

    @property
    def size(self) -> int:
        """Bytes of all files of the source."""
        return sum(path.stat().st_size for path in self.container.files)

    def messages(self, place: int) -> Messages:
        """The row's messages with opened RGB pictures; `RowError` where it is damaged."""
        with row_errors():
            entry = self.index[place]
            row = self.container.read(int(entry["start"]), int(entry["end"]))
            messages = self.source.read(row)
            for message in messages:
                for part in message["content"]:
                    if part["type"] == "image":
                        part["image"] = open_picture(
                            part["image"], self.images, allow_urls=self.source.allow_urls
                        )
        return messages


class Mixture:
    """The conversations of all sources, numbered 0 .. N - 1 in the order of the mixture file.

    `quarantined` (source -> row -> reason), the list at `list_at`, is left out and counted in
    `skipped`. Memory is 30 to 40 bytes per row, whatever the rows hold; a mixture can be pickled
    and forked.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        quarantined: Mapping[str, Mapping[int, str]] | None = None,
        list_at: Path | None = None,
    ) -> None:
        self.parts, self.list_at = tuple(parts), list_at
        listed = quarantined or {}
        self.skipped: dict[str, dict[str, int]] = {}
        """Source -> reason -> rows that are left out; only where there are any."""
        self._places = [self._places_of(p, listed.get(p.source.name, {})) for p in self.parts]
        self._first = np.cumsum([0, *(len(places) for places in self._places)])

    def _places_of(self, part: Part, listed: Mapping[int, str]) -> np.ndarray:
        """Places of the source's rows in an epoch, weights applied. Shape: [N], int32."""
        bad = np.isin(part.index["row"], np.fromiter(listed, np.int64, len(listed)))
        if bad.any():
            reasons = Counter(listed[int(row)] for row in part.index["row"][bad])
            self.skipped[part.source.name] = dict(reasons)
        return _weighted(np.flatnonzero(~bad).astype(np.int32), part.source)

    def __len__(self) -> int:
        return int(self._first[-1])

    def place(self, number: int) -> tuple[Part, int]:
        """The source of conversation `number`, and the row's place in it."""
        if not 0 <= number < len(self):
            raise IndexError(f"conversation {number} of a mixture that has {len(self)}")
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.parts[at], int(self._places[at][number - self._first[at]])

    def __getitem__(self, number: int) -> Messages:
        """The messages of conversation `number`, pictures opened.

        Raises:
            RowError: the row is damaged; the message names its source and number.
        """
        part, place = self.place(number)
        try:
            return part.messages(place)
        except RowError as error:
            raise RowError(error.kind, f"{self.where(number)}: {error}") from error

    def where(self, number: int) -> str:
        """File (or name on the hub) and row of conversation `number`."""
        part, place = self.place(number)
        return f"{part.source.path}, row {part.index['row'][place]}"

    def sizes(self) -> dict[str, int]:
        """Source -> bytes of its files, which a quarantine list keeps."""
        return {part.source.name: part.size for part in self.parts}


def open_mixture(
    mixture: str | Path | MixtureFile,
    *,
    root: Path | None = None,
    quarantine: Path | None = None,
    cache: Path | None = None,
    opening: Callable[[str], None] = lambda _: None,
) -> Mixture:
    """The mixture of a file or a bundled name, its files indexed.

    Args:
        mixture: the file, the name, or the result of `read_mixture`.
        root: the folder that all paths begin at; by default the one that the file names.
        quarantine: the list of rows to skip; by default `quarantine_path`.
        cache: the folder for indexes; by default $XDG_CACHE_HOME/trol/index.
        opening: called with each source's name before it is opened.

    Raises:
        UsageError: the mixture file is malformed.
        DataError: a file is missing or broken as a whole, or the quarantine list is stale.
    """
    file = mixture if isinstance(mixture, MixtureFile) else read_mixture(mixture, root=root)
    folder = cache or cache_folder() / "index"
    parts = []
    for source in file.sources:
        opening(source.name)
        container = _container(source, file.root)
        index = indexed(container, source, folder)
        parts.append(Part(source, container, file.root / source.images, index))
    place = quarantine or quarantine_path(file)
    reasons = read_quarantine(place, {part.source.name: part.size for part in parts})
    return Mixture(parts, reasons, place)


def _container(source: Source, root: Path) -> Container:
    path = root / source.path
    if path.suffix == ".parquet":
        if not any(path.parent.glob(path.name)):
            raise _missing(source, path)
        return Table(str(path))
    if path.suffix in JSON_FILES:
        if not path.is_file():
            raise _missing(source, path)
        return JSON_FILES[path.suffix](path)
    place = str(path) if path.is_dir() else source.path
    return Table(place, source.split, source.subset)


def _missing(source: Source, path: Path) -> DataError:
    return DataError(
        f"the source {source.name} has no file {path}; download it, name the folder that holds "
        "it as root, or take the source out of the mixture."
    )


def _weighted(places: np.ndarray, source: Source) -> np.ndarray:
    """Each place `weight` times; for a fraction, the source's name is the seed of a draw."""
    whole = int(source.weight)
    rng = np.random.default_rng(zlib.crc32(source.name.encode()))
    drawn = rng.permutation(len(places))[: round((source.weight - whole) * len(places))]
    return np.concatenate([np.tile(places, whole), places[np.sort(drawn)]])
