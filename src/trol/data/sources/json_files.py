"""Rows of JSON files, read one at a time: JSON lines, and one large JSON array."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trol.data.damage import RowError
from trol.errors import DataError

WINDOW = 1 << 22
"""Bytes of an array that are looked at together."""

LONGEST_ROW = 1 << 26
"""Bytes of the longest row of an array; a row that does not end by then is broken."""

Found = tuple[int, int, "dict[str, Any] | RowError"]
"""First byte, end, and the row that lies there (or why there is none)."""


class JsonLines:
    """A file with one JSON object per line; empty lines are passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}

    @property
    def files(self) -> list[Path]:
        """The one file."""
        return [self.path]

    def rows(self) -> Iterator[Found]:
        """All rows in order; a broken line is found as its `RowError`."""
        start = 0
        with self.path.open("rb") as file:
            for line in file:
                end = start + len(line)
                if not line.isspace():
                    yield start, end, self._tried(line)
                start = end

    def read(self, start: int, end: int) -> dict[str, Any]:
        """The row between two bytes; `RowError` where it is broken."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        # pread has no position that threads or forked workers could move under each other.
        return _parsed(os.pread(self._descriptor, end - start, start))

    def _tried(self, text: bytes) -> dict[str, Any] | RowError:
        try:
            return _parsed(text)
        except RowError as broken:
            return broken


class JsonArray(JsonLines):
    """A file that is one JSON array of objects; it is never in memory as a whole."""

    def rows(self) -> Iterator[Found]:
        """All rows in order; `DataError` where the array itself is broken."""
        with self.path.open("rb") as file:
            text = _characters(file)
            opened = _OPENING.match(text)
            if opened is None:
                raise DataError(
                    f"{self.path} begins with {text[:20]!r}, not with '[': give a JSON array of "
                    "rows, or JSON lines in a file whose name ends with .jsonl."
                )
            base, place, number = 0, opened.end(), 0
            while (span := _next_row(text, place, number)) != _END:
                if span is None:
                    more = _characters(file)
                    base, text, place = base + place, text[place:] + more, 0
                    if not more or len(text) > LONGEST_ROW:
                        raise DataError(
                            f"{self.path} is broken JSON behind row {number - 1}, at byte {base}: "
                            f"{text[:40]!r}; mend the file or download it again."
                        )
                    continue
                start, place = span
                yield base + start, base + place, self._tried(text[start:place].encode("latin-1"))
                number += 1


_OPENING = re.compile(r"(?:\xef\xbb\xbf)?[ \t\r\n]*\[")  # UTF-8 may begin with a mark of 3 bytes
_BETWEEN = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")
_END = (-1, -1)
_DECODER = json.JSONDecoder(strict=False)


def _characters(file: BinaryIO) -> str:
    """The next window, one character for each byte: places in it are places in the file."""
    return file.read(WINDOW).decode("latin-1")


def _next_row(text: str, place: int, number: int) -> tuple[int, int] | None:
    """Start and end of row `number`; `_END` behind the last; None if the text does not hold it."""
    between = _BETWEEN.match(text, place)
    assert between is not None
    if between[1] == "]":
        return _END
    if between.end() == len(text) or (between[1] == ",") != (number > 0):
        return None
    try:
        return between.end(), _DECODER.raw_decode(text, between.end())[1]
    except (json.JSONDecodeError, RecursionError):
        return None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as broken:
        raise RowError("broken_row", f"broken JSON ({broken}); mend or delete the row.") from broken
    except RecursionError as deep:
        raise RowError("broken_row", "the JSON is nested too deeply; flatten the row.") from deep
    if not isinstance(row, dict):
        raise RowError(
            "broken_row", f"the row is {type(row).__name__}, not an object with keys; mend it."
        )
    return row
