"""Rows of tables: parquet files, and whatever else the `datasets` library opens.

`datasets` maps its Arrow files into memory, so any row is read alone and a table of any size
needs next to no memory; parquet is converted to Arrow once, in the library's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trol.data.damage import RowError
from trol.errors import DataError

ROWS_AT_ONCE = 1000
"""Rows that are outlined together."""

LEFT_OUT = "bytes"
"""Stands for a picture's bytes in a row that is only outlined."""


class Table:
    """The rows of one split; `source` is a parquet path or pattern, a folder, or a hub name.

    `subset` is for datasets that have several. `DataError` where there is no such table.
    """

    def __init__(self, source: str, split: str = "train", subset: str | None = None) -> None:
        self.source = source
        self._rows = _without_decoding(_opened(source, split, subset))

    @property
    def files(self) -> list[Path]:
        """The Arrow files that hold the rows."""
        return [Path(file["filename"]) for file in self._rows.cache_files]

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any] | RowError]]:
        """Number, next number, and the row with `LEFT_OUT` for the bytes of each picture."""
        start = 0
        for batch in self._rows.with_format("arrow").iter(ROWS_AT_ONCE):
            columns = {name: _outlined(batch[name]) for name in batch.column_names}
            for row in zip(*columns.values(), strict=True):
                yield start, start + 1, dict(zip(columns, row, strict=True))
                start += 1

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
    """The same rows with pictures as their bytes, which are opened as those of all sources are."""
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
