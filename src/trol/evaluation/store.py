"""Results on disk as soon as they are there: measurements by name, and the rows of an oracle.

Both are files of JSON Lines beside a header that says what they belong to; only a run that agrees
with the whole header goes on with them. What ends a run costs the measurement that it was at: a
last line that a kill tore does not count.

An oracle's folder holds every question answered at every cost level. `trol oracle` writes one file
of rows per shard; its report and the training of routers read them::

    {"item": 12, "question": str, "reference": str, "answer": str, "type": str,
     "plan": "0-3 11", "cost": 5,              the level: its plan and the layers of a token
     "sample": 0,                              0 is greedy; 1, 2, ... are drawn at full depth
     "new_tokens": 7, "scores": {metric: number}}
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trol.checkpoints.adapter import text_digest
from trol.errors import DataError, UsageError, unwritable
from trol.evaluation.answers import LOWER_IS_BETTER, StepsDone
from trol.evaluation.items import Item
from trol.evaluation.shards import WHOLE, Shard
from trol.files import write_json

HEADER = "rows.json"
"""The file of an oracle's folder that says what the rows belong to."""

RESULT = "oracle.json"
"""The file of a finished oracle's report."""

Once = Callable[[str, Callable[[], Any]], Any]
"""(name, measure) -> the value of that name, measured where it is not there yet."""

RowKey = tuple[int, str, int]
"""Item, plan and sample, by which a row differs from all others of its folder."""


class Measurements:
    """Values by name, each measured once, and kept in a file if one is named.

    Args:
        path: the file; None to keep nothing after this process.
        header: what the measurements belong to, as JSON; it is the file's first line.

    Raises:
        UsageError: the file belongs to another run, or cannot be made.
        DataError: it is damaged.
    """

    def __init__(self, path: Path | None = None, header: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        if path is None:
            return
        expected = json.loads(json.dumps(header or {}))
        _cut_torn_end(path)
        lines = _measured_lines(path)
        if not lines:
            _append_lines(path, [json.dumps(expected)])
        elif other := _differences(lines[0], expected):
            raise UsageError(
                f"{path} keeps measurements of an unfinished run with other settings ({other}); "
                "give the same settings to go on with it, name another file with --out, or remove "
                "it."
            )
        for line in lines[1:]:
            self.values |= line

    def look_again(self) -> None:
        """Takes note of what other processes have measured meanwhile."""

    def value(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of that name, JSON; `measure()` is called where it is not there yet."""
        if name not in self.values:
            self.values[name] = measure()
            if self.path is not None:
                _append_lines(self.path, [json.dumps({name: self.values[name]})])
        return self.values[name]

    def counted(self, progress: StepsDone, of: int) -> Once:
        """`value`, which calls `progress` after each measurement; it is called now as well."""

        def show() -> None:
            progress(min(len(self.values), of), of)

        def value(name: str, measure: Callable[[], Any]) -> Any:
            before = len(self.values)
            there = self.value(name, measure)
            if len(self.values) > before:
                show()
            return there

        show()
        return value

    def finish(self) -> None:
        """Removes the file, since its purpose is fulfilled."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class SharedMeasurements(Measurements):
    """Values of one run that several processes measure, each in a file of its own in `folder`.

    Raises as `Measurements`, also where another process's file belongs to another run.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], shard: Shard) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._header, self.values = folder, json.loads(json.dumps(header)), {}
        self.look_again()  # before a file of another run's is begun
        super().__init__(folder / "points-{}-of-{}.jsonl".format(*shard), header)
        self.look_again()

    def look_again(self) -> None:
        for path in sorted(self._folder.glob("points-*.jsonl")):
            lines = _measured_lines(path)
            if lines and (other := _differences(lines[0], self._header)):
                raise UsageError(
                    f"{path} belongs to another run ({other}); give all parts the same settings, "
                    "or name another folder with --out."
                )
            for line in lines[1:]:
                self.values |= line


def _measured_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none where there is no file; a last line may be half there."""
    try:
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]
        lines = [json.loads(line) for line in whole]
        if all(isinstance(line, dict) for line in lines):
            return lines
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        pass
    raise DataError(f"{path} is no file of measurements; remove it, and they are made anew.")


def items_digest(items: Sequence[Item]) -> str:
    """A digest of a set of questions with their references."""
    return text_digest("\n".join(repr((i.question, i.answer, i.type)) for i in items))


@dataclass(frozen=True)
class OracleRow:
    """One question, answered at one cost level."""

    item: int
    """Place of the question in the set that the header names."""
    question: str
    reference: str
    answer: str
    type: str
    plan: str
    """Plan text of the level."""
    cost: int
    """Layers that a token of the answer visits at this level."""
    sample: int
    """0 for the greedy answer; 1, 2, ... number the answers drawn at full depth."""
    new_tokens: int
    """Tokens of the answer, its end among them."""
    scores: dict[str, float]
    """Metric -> what this answer scores; the loss in nats per token."""

    @property
    def key(self) -> RowKey:
        """Item, plan and sample."""
        return self.item, self.plan, self.sample

    def value(self, metric: str) -> float:
        """The score, higher is better: a loss counts with the other sign."""
        score = self.scores[metric]
        return -score if metric in LOWER_IS_BETTER else score


_ROW_KEYS = {field.name for field in fields(OracleRow)}


def read_rows(folder: str | Path, *, samples: bool = False) -> list[OracleRow]:
    """All finished rows of an oracle's folder, by item and cost; each key once.

    Args:
        folder: what `trol oracle --out` named.
        samples: whether the answers drawn for the best-of-n control are wanted too.

    Raises:
        DataError: the folder holds no oracle, or a line other than a torn last one is no row.
    """
    read_header(folder)
    return unique(row for row in _all_rows(Path(folder)) if samples or row.sample == 0)


def read_header(folder: str | Path) -> dict[str, Any]:
    """The header of an oracle's folder: `{"task", "split", "layers", "menu", "scope", ...}`.

    Raises:
        DataError: the folder holds no oracle, or its header is damaged.
    """
    path = Path(folder) / HEADER
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} tells nothing of an oracle ({error}); name a folder that `trol oracle --out` "
            "has written."
        ) from error


def unique(rows: Iterable[OracleRow]) -> list[OracleRow]:
    """The rows by item, cost, plan and sample, each key once."""
    by_key = {row.key: row for row in rows}
    return sorted(by_key.values(), key=lambda row: (row.item, row.cost, row.plan, row.sample))


def rows_of(path: Path) -> list[OracleRow]:
    """The whole lines of one file; a last line without an end was torn by a kill and is left out.

    Raises:
        DataError: a whole line is no row.
    """
    return [
        _row(line, f"{path}, line {number}")
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1)
    ]


def _row(line: bytes, where: str) -> OracleRow:
    try:
        values: Any = json.loads(line)
        problem = "is no row of an oracle"
    except ValueError as error:
        values, problem = None, f"is not JSON ({error})"
    if not isinstance(values, dict) or set(values) != _ROW_KEYS:
        raise DataError(
            f"{where} {problem}; remove this line, and the same command makes its row anew."
        )
    return OracleRow(**values)


def _row_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.jsonl"))


def _all_rows(folder: Path) -> list[OracleRow]:
    return [row for path in _row_files(folder) for row in rows_of(path)]


class Store:
    """The rows of one shard, and a view of those of all shards.

    Rows are appended by whole batches, each of them on the disk before the next begins.

    Args:
        folder: where the rows are.
        header: what they belong to, as JSON; the first run writes it, all others must agree.
        shard: which part this run works on, and of how many: (0, 2) is the first of two.

    Raises:
        UsageError: the folder belongs to another run, or cannot be made.
        DataError: the header or a row is damaged.
    """

    def __init__(self, folder: str | Path, header: Mapping[str, Any], shard: Shard = WHOLE) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot write into {self.folder}: {error.strerror}; name a folder that can be "
                "made."
            ) from error
        _check_header(self.folder / HEADER, header)
        index, shards = shard
        self.path = self.folder / f"rows-{index}-of-{shards}.jsonl"
        _cut_torn_end(self.path)
        self.look_again()

    def rows(self) -> list[OracleRow]:
        """The finished rows of all shards, in the order of the files."""
        return _all_rows(self.folder)

    def look_again(self) -> None:
        """Takes note of what other shards have finished meanwhile."""
        self._keys = {row.key for row in self.rows()}

    def lacks(self, keys: Sequence[RowKey]) -> bool:
        """Whether some of these rows are not finished."""
        return any(key not in self._keys for key in keys)

    def append(self, rows: Sequence[OracleRow]) -> None:
        """Puts the rows that are new on the disk, all at once."""
        new = [row for row in rows if row.key not in self._keys]
        lines = (json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) for row in new)
        _append_lines(self.path, lines)
        self._keys |= {row.key for row in new}


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Writes the header, or compares it with the one that is there."""
    expected = json.loads(json.dumps(header))
    if not path.is_file():
        if _row_files(path.parent):
            raise DataError(
                f"{path.parent} holds rows but no {path.name}, so what they belong to is not "
                "known; name another folder with --out, or remove the rows."
            )
        write_json(path, expected)
    elif other := _differences(read_header(path.parent), expected):
        raise UsageError(
            f"{path.parent} belongs to another oracle ({other}); name another folder with --out, "
            "or give the same model, task, menu and settings as before."
        )


@dataclass(frozen=True)
class OracleResult:
    """The part of a finished oracle's report that curves use; see `oracle_report.report`."""

    task: str
    split: str
    scope: str
    metric: str
    layers: int
    n: int
    full: float
    equal_budget: dict[str, float]
    curve: list[dict[str, float]]
    run: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "OracleResult":
        """The result in the folder of a finished oracle.

        Raises:
            UsageError: the folder holds no finished oracle.
            DataError: its file is damaged.
        """
        path = folder / RESULT
        if not path.is_file():
            raise UsageError(
                f"{folder} holds no finished oracle ({RESULT}); run `trol oracle MODEL --out "
                f"{folder}` to its end."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); run `trol oracle` again.") from error
        needed = [one.name for one in fields(cls) if one.default_factory is MISSING]
        if missing := [key for key in needed if key not in values]:
            raise DataError(f"{path} lacks {', '.join(missing)}; run `trol oracle` again.")
        return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})


def _append_lines(path: Path, lines: Iterable[str]) -> None:
    """Puts lines behind those of a file, on the disk before this returns."""
    data = "".join(line + "\n" for line in lines).encode()
    try:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path.parent, error) from error


def _cut_torn_end(path: Path) -> None:
    """Takes a last line without an end away: a kill tore it, and it is made anew."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            os.fsync(file.fileno())


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what two headers differ, in words; nothing where they agree."""
    keys = (key for key in {**there, **here} if there.get(key) != here.get(key))
    return "; ".join(_difference(key, there.get(key), here.get(key)) for key in keys)


def _difference(key: str, there: Any, here: Any) -> str:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return _differences(there, here)
    if re.fullmatch("[0-9a-f]{32}", str(here)):  # a digest says nothing to people
        return f"other {key}"
    return f"{key} {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
