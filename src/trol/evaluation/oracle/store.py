"""The folder of an oracle: what it belongs to, and the rows that are finished.

A header names model, questions, menu and settings; a folder is only gone on with by a run that
agrees with all of it. Rows are appended by whole batches, each of them on the disk before the
next begins, so that whatever ends a run costs the batch that it was at. Every shard appends to a
file of its own and reads all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trol.data.oracle_rows import HEADER, OracleRow, line_of, read_header, row_files, rows_of
from trol.data.writing import whole_file
from trol.errors import DataError, UsageError
from trol.evaluation.kept import append_lines, cut_torn_end, differences


class Store:
    """The rows of one shard, and a view of those of all shards.

    Args:
        folder: where the rows are.
        header: what they belong to, as JSON; the first run writes it, all others must agree.
        shard: which part this run works on, and of how many: (0, 2) is the first of two.

    Raises:
        UsageError: the folder belongs to another run, or cannot be made.
        DataError: the header or a row is damaged.
    """

    def __init__(
        self, folder: str | Path, header: Mapping[str, Any], shard: tuple[int, int] = (0, 1)
    ) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot write into {self.folder}: {error.strerror}; name a folder that can be "
                "made."
            ) from error
        _agree(self.folder / HEADER, header)
        index, shards = shard
        self.path = self.folder / f"rows-{index}-of-{shards}.jsonl"
        cut_torn_end(self.path)
        self.look_again()

    def rows(self) -> list[OracleRow]:
        """The finished rows of all shards, as they lie in the files."""
        return [row for path in row_files(self.folder) for row in rows_of(path)]

    def look_again(self) -> None:
        """Takes note of what other shards have finished meanwhile."""
        self._keys = {row.key for row in self.rows()}

    def lacks(self, keys: Sequence[tuple[int, str, int]]) -> bool:
        """Whether some of these rows are not finished."""
        return any(key not in self._keys for key in keys)

    def append(self, rows: Sequence[OracleRow]) -> None:
        """Puts the rows that are new on the disk, all at once."""
        new = [row for row in rows if row.key not in self._keys]
        append_lines(self.path, map(line_of, new))
        self._keys |= {row.key for row in new}


def _agree(path: Path, header: Mapping[str, Any]) -> None:
    """Writes the header, or checks the one that is there."""
    wanted = json.loads(json.dumps(header))
    if not path.is_file():
        if row_files(path.parent):
            raise DataError(
                f"{path.parent} holds rows but no {path.name}, so nobody knows what they belong "
                "to; name another folder with --out, or remove the rows."
            )
        with whole_file(path) as file:
            json.dump(wanted, file, indent=2, ensure_ascii=False)
        return
    found = read_header(path.parent)
    if told := differences(found, wanted):
        raise UsageError(
            f"{path.parent} belongs to another oracle ({told}); name another folder with --out, "
            "or give the same model, task, menu and settings as before."
        )
