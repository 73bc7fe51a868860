"""Mixtures: the conversations of many sources under one numbering, read from disk one by one."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trol.data.formats import Messages, RowError, read_row, row_errors
from trol.data.images import open_picture
from trol.data.mixture_file import (
    MixtureFile,
    Source,
    quarantine_path,
    read_mixture,
    read_quarantine,
)
from trol.data.row_files import Container, Index, JsonArray, JsonLines, Table, cache_folder, indexed
from trol.errors import DataError

CHARACTERS_PER_TOKEN = 4
"""What a token is estimated as, for grouping by length."""


@dataclass(frozen=True)
class Part:
    """One source of an opened mixture; its rows have places 0 .. len(index) - 1."""

    source: Source
    container: Container
    images: Path
    """The folder that relative image paths begin at."""
    index: Index

    @property
    def size(self) -> int:
        """Bytes of all files of the source."""
        return sum(path.stat().st_size for path in self.container.files)

    def row_number(self, place: int) -> int:
        """The number, from 0, that the row has in its file or table."""
        return int(self.index.rows[place])

    def messages(self, place: int) -> Messages:
        """The row's messages with opened RGB pictures; `RowError` where it is damaged."""
        with row_errors():
            row = self.container.read(int(self.index.starts[place]), int(self.index.ends[place]))
            messages = _read(self.source, row)
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
        self._places = [self._kept(part, listed.get(part.source.name, {})) for part in self.parts]
        self._first = np.cumsum([0, *(len(places) for places in self._places)])

    def _kept(self, part: Part, listed: Mapping[int, str]) -> np.ndarray:
        """Places of the source's rows that an epoch has, weights applied. Shape: [N], int32."""
        bad = np.isin(part.index.rows, np.fromiter(listed, np.int64, len(listed)))
        if bad.any():
            reasons = Counter(listed[int(row)] for row in part.index.rows[bad])
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

    def conversation(self, number: int) -> Messages:
        """The messages of conversation `number`, ready for `trol.data.chat.encode`.

        Raises:
            RowError: the row is damaged; the message names its source and number.
        """
        part, place = self.place(number)
        with self.naming(number):
            return part.messages(place)

    @contextmanager
    def naming(self, number: int) -> Generator[None]:
        """While open, errors of conversation `number` are `RowError`s that name source and row."""
        try:
            with row_errors():
                yield
        except RowError as error:
            raise RowError(error.kind, f"{self.where(number)}: {error}") from error

    def where(self, number: int) -> str:
        """The file, or the name on the hub, and the row in it that conversation `number` is."""
        part, place = self.place(number)
        return f"{part.source.path}, row {part.row_number(place)}"

    def lengths(self, *, tokens_per_image: int) -> np.ndarray:
        """Estimated tokens of each conversation, pictures included. Shape: [N], int64."""
        estimated = [
            part.index.characters[places] // CHARACTERS_PER_TOKEN
            + part.index.images[places].astype(np.int64) * tokens_per_image
            for part, places in zip(self.parts, self._places, strict=True)
        ]
        return np.concatenate(estimated)

    def sizes(self) -> dict[str, int]:
        """Source -> bytes of its files, by which a quarantine list knows them."""
        return {part.source.name: part.size for part in self.parts}

    def counts(self) -> dict[str, int]:
        """Source -> conversations in an epoch."""
        pairs = zip(self.parts, self._places, strict=True)
        return {part.source.name: len(places) for part, places in pairs}


def open_mixture(
    mixture: str | Path | MixtureFile,
    *,
    root: Path | None = None,
    quarantine: Path | None = None,
    cache: Path | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Mixture:
    """The mixture of a YAML file or a carried name, its files indexed.

    Args:
        mixture: the file, the name, or what `read_mixture` made of it.
        root: the folder that all paths begin at; by default the one that the file names.
        quarantine: the list of rows to skip; by default `quarantine_path`.
        cache: where indexes are kept; by default $XDG_CACHE_HOME/trol/index.
        told: is told each source's name before it is opened.

    Raises:
        UsageError: the mixture file is malformed.
        DataError: a file is missing or broken as a whole, or the quarantine list is stale.
    """
    described = mixture if isinstance(mixture, MixtureFile) else read_mixture(mixture, root=root)
    folder = cache or cache_folder() / "index"
    parts = []
    for source in described.sources:
        told(source.name)
        parts.append(_part(source, described.root, folder))
    place = quarantine or quarantine_path(described)
    listed = read_quarantine(place, {part.source.name: part.size for part in parts})
    return Mixture(parts, listed, place)


def _part(source: Source, root: Path, folder: Path) -> Part:
    container = _container(source, root)
    index = indexed(
        container,
        source.reading(),
        folder=folder,
        passes=source.passes,
        read=lambda row: _read(source, row),
    )
    return Part(source, container, root / source.images, index)


def _read(source: Source, row: Mapping[str, Any]) -> Messages:
    return read_row(row, source.format, source.columns, source.placeholder)


_FILES = {".jsonl": JsonLines, ".json": JsonArray}
"""Ending of a file -> what reads it."""


def _container(source: Source, root: Path) -> Container:
    path = root / source.path
    if path.suffix == ".parquet":
        if not any(path.parent.glob(path.name)):
            raise _missing(source, path)
        return Table(str(path))
    if path.suffix in _FILES:
        if not path.is_file():
            raise _missing(source, path)
        return _FILES[path.suffix](path)
    place = str(path) if path.is_dir() else source.path
    return Table(place, source.split, source.subset)


def _missing(source: Source, path: Path) -> DataError:
    return DataError(
        f"the source {source.name} has no file {path}; download it, name the folder that holds "
        "it as root, or take the source out of the mixture."
    )


def _weighted(places: np.ndarray, source: Source) -> np.ndarray:
    """Each place as often as the weight says; a part of them is drawn by the source's name."""
    whole = int(source.weight)
    draw = np.random.default_rng(zlib.crc32(source.name.encode()))
    few = draw.permutation(len(places))[: round((source.weight - whole) * len(places))]
    return np.concatenate([np.tile(places, whole), places[np.sort(few)]])
