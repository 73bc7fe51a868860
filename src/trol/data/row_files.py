"""Rows of JSON files and tables, read one at a time by their place.

JSON lines and JSON arrays are read as bytes. Parquet files, and whatever else the `datasets`
library opens, are mapped into memory by that library, so a table of any size needs next to no
memory; parquet is converted to Arrow once, in the library's own cache.
"""

import json
import os
import re
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from trol.data.formats import RowError
from trol.errors import DataError

WINDOW = 1 << 22
"""Bytes of an array that are read at once."""

LONGEST_ROW = 1 << 26
"""Bytes of the longest row of an array; a row that does not end by then is broken."""

PlacedRow = tuple[int, int, "dict[str, Any] | RowError"]
"""First byte (number, in a table), end, and the row there or what is wrong with it."""


class JsonLines:
    """A file with one JSON object per line; empty lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}

    @property
    def files(self) -> list[Path]:
        """The one file."""
        return [self.path]

    def rows(self) -> Iterator[PlacedRow]:
        """All rows in order, a `RowError` for a broken line."""
        start = 0
        with self.path.open("rb") as file:
            for line in file:
                end = start + len(line)
                if not line.isspace():
                    yield start, end, _row_or_error(line)
                start = end

    def place(self, start: int) -> str:
        """Where the row lies that begins at this byte, as an editor counts."""
        with self.path.open("rb") as file:
            blocks = iter(lambda: file.read(min(WINDOW, start - file.tell())), b"")
            return f"line {1 + sum(block.count(10) for block in blocks)}"  # 10: a line break

    def read(self, start: int, end: int) -> dict[str, Any]:
        """The row between two bytes; `RowError` where it is broken."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        # pread has no position that threads or forked workers could move under each other.
        return _parsed(os.pread(self._descriptor, end - start, start))


class JsonArray(JsonLines):
    """A file that is one JSON array of objects; it is never in memory as a whole."""

    def rows(self) -> Iterator[PlacedRow]:
        """All rows in order; `DataError` where the array itself is broken."""
        with self.path.open("rb") as file:
            text = _characters(file)
            opening = _OPENING.match(text)
            if opening is None:
                raise DataError(
                    f"{self.path} begins with {text[:20]!r}, not with '[': give a JSON array of "
                    "rows, or JSON lines in a file whose name ends with .jsonl."
                )
            base, place, number = 0, opening.end(), 0
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
                yield base + start, base + place, _row_or_error(text[start:place].encode("latin-1"))
                number += 1


JSON_FILES = {".json": JsonArray, ".jsonl": JsonLines}
"""Ending of a JSON file of rows -> its reader."""

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


def _row_or_error(text: bytes) -> dict[str, Any] | RowError:
    try:
        return _parsed(text)
    except RowError as broken:
        return broken


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as broken:
        why: object = broken
        if isinstance(broken, json.JSONDecodeError):  # which counts lines within the row
            why = f"{broken.msg} at character {broken.pos + 1} of the row"
        raise RowError("broken_row", f"broken JSON ({why}); mend or delete the row.") from broken
    except RecursionError as deep:
        raise RowError("broken_row", "the JSON is nested too deeply; flatten the row.") from deep
    if not isinstance(row, dict):
        raise RowError(
            "broken_row", f"the row is {type(row).__name__}, not an object with keys; mend it."
        )
    return row


ROWS_AT_ONCE = 1000
"""Rows that are outlined at once."""

LEFT_OUT = "bytes"
"""Put in the place of a picture's bytes where only the outline of a row is read."""


class Table:
    """The rows of one split, numbered from 0.

    Args:
        source: a parquet path or pattern, a folder, or a hub name.
        split: the split's name.
        subset: the configuration, of a dataset that has several.

    Raises:
        DataError: there is no such table.
    """

    def __init__(self, source: str, split: str = "train", subset: str | None = None) -> None:
        self.source = source
        self._rows = _without_decoding(_opened(source, split, subset))

    @property
    def files(self) -> list[Path]:
        """The Arrow files that hold the rows."""
        return [Path(file["filename"]) for file in self._rows.cache_files]

    def rows(self) -> Iterator[PlacedRow]:
        """Number, next number, and the row with `LEFT_OUT` for the bytes of each picture."""
        start = 0
        for batch in self._rows.with_format("arrow").iter(ROWS_AT_ONCE):
            columns = {name: _outlined(batch[name]) for name in batch.column_names}
            for row in zip(*columns.values(), strict=True):
                yield start, start + 1, dict(zip(columns, row, strict=True))
                start += 1

    def place(self, start: int) -> str:
        """Where the row with this number lies, as people count."""
        return f"row {start + 1}"

    def read(self, start: int, end: int) -> dict[str, Any]:
        """The row with this number; `end` is the next number."""
        assert end == start + 1
        return self._rows[start]


def _opened(source: str, split: str, subset: str | None) -> Any:
    try:
        import datasets  # noqa: PLC0415 - heavy, and only tables need it
        from datasets.exceptions import DatasetsError  # noqa: PLC0415
    except ImportError as missing:
        raise DataError(
            f"{source} is read with the datasets library; run: pip install 'trol-vlm[data]'"
        ) from missing
    try:
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        if any(Path(source, name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(source)
            return _split(saved, source, split) if isinstance(saved, dict) else saved
        return datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, DatasetsError) as unopened:
        raise DataError(
            f"the datasets library opens no table {source!r} (split {split!r}): {unopened} "
            "Check the path or name, and that the file is whole."
        ) from unopened


def _split(saved: Any, source: str, split: str) -> Any:
    if split not in saved:
        raise DataError(f"{source} has no split {split!r}; set `split` to one of {list(saved)}.")
    return saved[split]


def _without_decoding(rows: Any) -> Any:
    """The same rows with pictures as bytes, for `trol.data.images` to open."""
    import datasets  # noqa: PLC0415

    plain = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, plain)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(plain))
    return rows


def _outlined(column: Any) -> list[Any]:
    """The column's values; where they are bytes, only whether (and how many) there are."""
    import pyarrow  # noqa: PLC0415 - comes with datasets
    from pyarrow import compute  # noqa: PLC0415

    types = pyarrow.types
    nested = types.is_list(column.type) or types.is_large_list(column.type)
    inner = column.type.value_type if nested else column.type
    if not _holds_bytes(inner, pyarrow):
        return column.to_pylist()
    if not nested:
        return [LEFT_OUT if there else None for there in column.is_valid().to_pylist()]
    lengths = compute.call_function("list_value_length", [column]).to_pylist()
    return [None if length is None else [LEFT_OUT] * length for length in lengths]


def _holds_bytes(kind: Any, pyarrow: Any) -> bool:
    types = pyarrow.types
    if types.is_struct(kind):
        return any(_holds_bytes(field.type, pyarrow) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


Container = JsonLines | Table
"""A file or table that holds rows."""

LocatedRow = tuple[Callable[[], str], "dict[str, Any] | RowError"]
"""What says where a row lies, and the row there or what is wrong with it."""


def located_rows(container: Container) -> Iterator[LocatedRow]:
    """All rows in order, each with what says where it lies."""
    return ((partial(container.place, start), row) for start, _, row in container.rows())
