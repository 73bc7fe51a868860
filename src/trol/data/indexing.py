"""Where each row of a source lies and how long it is: read through once, then kept on disk."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trol.data.damage import RowError
from trol.data.sources.formats import Messages
from trol.data.writing import whole_file

VERSION = 1
"""Of what an index holds; another version is made anew."""


class Container(Protocol):
    """A file or table that holds rows."""

    @property
    def files(self) -> list[Path]:
        """Where the rows lie."""
        ...

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any] | RowError]]:
        """Start, end and content of every row, in order."""
        ...

    def read(self, start: int, end: int) -> dict[str, Any]:
        """One row; `RowError` where it is broken."""
        ...


@dataclass(frozen=True)
class Index:
    """R rows of a source that its filter lets through."""

    rows: np.ndarray
    """Number of the row in its source, from 0. Shape: [R], int64."""
    starts: np.ndarray
    """First byte (of a file) or number (of a table). Shape: [R], int64."""
    ends: np.ndarray
    """The place behind it. Shape: [R], int64."""
    characters: np.ndarray
    """Of all texts together; 0 for a damaged row. Shape: [R], int32."""
    images: np.ndarray
    """Pictures of the row; 0 for a damaged row. Shape: [R], int16."""

    def __len__(self) -> int:
        return len(self.rows)


def indexed(
    container: Container,
    settings: Mapping[str, Any],
    *,
    folder: Path,
    passes: Callable[[Mapping[str, Any]], bool],
    read: Callable[[Mapping[str, Any]], Messages],
) -> Index:
    """The index kept in `folder`, or a new one if the files or the settings have changed.

    `passes` says whether a row belongs to the source, `read` makes its messages; both follow
    from `settings`, which name the index together with path, size and time of the files.
    """
    kept = folder / f"{_key(container, settings)}.npz"
    if kept.exists():
        with np.load(kept, allow_pickle=False) as arrays:
            return Index(**{field.name: arrays[field.name] for field in fields(Index)})
    index = build(container, passes=passes, read=read)
    with whole_file(kept, "wb") as file:
        np.savez(file, **{field.name: getattr(index, field.name) for field in fields(Index)})
    return index


def build(
    container: Container,
    *,
    passes: Callable[[Mapping[str, Any]], bool],
    read: Callable[[Mapping[str, Any]], Messages],
) -> Index:
    """The index from one reading; damaged rows stay in it, for the check to name them."""
    columns = array("q"), array("q"), array("q"), array("i"), array("h")
    for number, (start, end, row) in enumerate(container.rows()):
        if not isinstance(row, RowError) and not passes(row):
            continue
        sizes = (0, 0) if isinstance(row, RowError) else _measured(row, read)
        for column, value in zip(columns, (number, start, end, *sizes), strict=True):
            column.append(value)
    return Index(*(np.array(column) for column in columns))


def _measured(
    row: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Messages]
) -> tuple[int, int]:
    """Characters of all texts, and how many pictures."""
    try:
        messages = read(row)
    except RowError:
        return 0, 0
    parts = [part for message in messages for part in message["content"]]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return sum(map(len, texts)), len(parts) - len(texts)


def _key(container: Container, settings: Mapping[str, Any]) -> str:
    states = [(str(path.resolve()), *_state(path)) for path in container.files]
    described = json.dumps([VERSION, states, settings], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
