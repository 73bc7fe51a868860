"""The rows of an oracle's folder: every question answered at every cost level, one JSON line each.

`trol oracle` writes them, one file per shard; its solver and the training of routers read them::

    {"item": 12, "question": str, "reference": str, "answer": str, "type": str,
     "plan": "0-3 11", "cost": 5,              the level: its plan and the layers of a token
     "sample": 0,                              0 is greedy; 1, 2, ... are drawn at full depth
     "new_tokens": 7, "scores": {metric: number}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trol.errors import DataError

HEADER = "rows.json"
"""What the rows belong to: the file beside them."""

LOWER_IS_BETTER = frozenset({"loss"})
"""Metrics that count with the other sign when levels are compared."""


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
    """What an answer's token costs at this level. Unit: layers."""
    sample: int
    """0 for the greedy answer; 1, 2, ... number the answers drawn at full depth."""
    new_tokens: int
    """Tokens of the answer, its end among them."""
    scores: dict[str, float]
    """Metric -> what this answer got; the loss in nats per token."""

    @property
    def key(self) -> tuple[int, str, int]:
        """What tells this row from all others of its folder: item, plan, sample."""
        return self.item, self.plan, self.sample

    def value(self, metric: str) -> float:
        """The score, higher is better: a loss counts with the other sign."""
        score = self.scores[metric]
        return -score if metric in LOWER_IS_BETTER else score


def row_files(folder: str | Path) -> list[Path]:
    """The files of rows in `folder`, in the order of their names."""
    return sorted(Path(folder).glob("rows-*.jsonl"))


def read_rows(folder: str | Path, *, samples: bool = False) -> list[OracleRow]:
    """All finished rows of an oracle's folder, by item and cost; each key once.

    Args:
        folder: what `trol oracle --out` named.
        samples: whether the answers drawn for the best-of-n control are wanted too.

    Raises:
        DataError: the folder holds no oracle, or a line other than a torn last one is no row.
    """
    read_header(folder)
    return unique(
        row for path in row_files(folder) for row in rows_of(path) if samples or row.sample == 0
    )


def read_header(folder: str | Path) -> dict[str, Any]:
    """What the rows of a folder belong to: `{"task", "split", "layers", "menu", "scope", ...}`.

    Raises:
        DataError: the folder holds no oracle, or its header is damaged.
    """
    path = Path(folder) / HEADER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} tells nothing of an oracle ({error}); name a folder that `trol oracle --out` "
            "has written."
        ) from error
    return found


def shown(metric: str, value: float) -> str:
    """A score that is better when higher, as people read it: points of 100, or nats of loss."""
    if metric in LOWER_IS_BETTER:
        return f"{-value:.3f} nats".replace("-", "−")
    return f"{100 * value:.1f}"


def unique(rows: Iterable[OracleRow]) -> list[OracleRow]:
    """The rows by item, cost, plan and sample, each key once."""
    known = {row.key: row for row in rows}
    return sorted(known.values(), key=lambda row: (row.item, row.cost, row.plan, row.sample))


def rows_of(path: Path) -> list[OracleRow]:
    """The whole lines of one file; a last line without an end was torn by a kill and is left out.

    Raises:
        DataError: a whole line is no row.
    """
    return [
        _row(line, f"{path}, line {number}")
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1)
    ]


def line_of(row: OracleRow) -> str:
    """A row as its line, without the end."""
    return json.dumps(asdict(row), ensure_ascii=False, allow_nan=False)


_NAMES = {field.name for field in fields(OracleRow)}


def _row(line: bytes, where: str) -> OracleRow:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON ({error}); remove this line, and the same command makes its "
            "row anew."
        ) from error
    if not isinstance(found, dict) or set(found) != _NAMES:
        raise DataError(
            f"{where} is no row of an oracle; remove this line, and the same command makes its "
            "row anew."
        )
    return OracleRow(**found)
