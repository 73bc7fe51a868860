"""The rows of an oracle's folder: every question answered at every cost level, one JSON line each.

`trol oracle` writes them, one file per shard; its solver and the training of routers read them::

    {"item": 12, "question": str, "reference": str, "answer": str, "type": str,
     "plan": "0-3 11", "cost": 5,              the level: its plan and the layers of a token
     "sample": 0,                              0 is greedy; 1, 2, ... are drawn at full depth
     "new_tokens": 7, "scores": {metric: number}}

The folder of an oracle: what it belongs to, and the rows that are finished.

A header names model, questions, menu and settings; a folder is only gone on with by a run that
agrees with all of it. Rows are appended by whole batches, each of them on the disk before the
next begins, so that whatever ends a run costs the batch that it was at. Every shard appends to a
file of its own and reads all of them.

The menu of an oracle: plans from cheap to dear, the full model among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trol.depth import Plan
from trol.errors import DataError, UsageError, unknown
from trol.evaluation.kept import append_lines, cut_torn_end, differences
from trol.files import write_whole
from trol.policies.planned import STATIC, static_plan

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
        write_whole(path, json.dumps(wanted, indent=2, ensure_ascii=False))
        return
    found = read_header(path.parent)
    if told := differences(found, wanted):
        raise UsageError(
            f"{path.parent} belongs to another oracle ({told}); name another folder with --out, "
            "or give the same model, task, menu and settings as before."
        )


_SERIES = re.compile(r"(?P<method>[a-z]+):(?P<levels>\d+)")


@dataclass(frozen=True)
class Level:
    """One cost level: a plan, and what it costs."""

    plan: Plan
    text: str
    """The plan with every visited layer named, so that one plan has one text."""
    cost: int
    """Σ_l n_l, the layers that a token of the answer visits. Unit: layers."""


@dataclass(frozen=True)
class Menu:
    """The levels, cheapest first."""

    levels: tuple[Level, ...]
    layers: int
    """Layers of the stack."""

    @property
    def full(self) -> int:
        """Which level is the full model."""
        return next(i for i, one in enumerate(self.levels) if _is_full(one.plan, self.layers))

    @property
    def costs(self) -> list[int]:
        """What each level costs. Unit: layers."""
        return [level.cost for level in self.levels]


def read_menu(text: str, layers: int, *, seed: int = 0, read: Callable[[str], Plan] = Plan) -> Menu:
    """The menu that `text` names for a stack of `layers` layers.

    Args:
        text: plans with commas between; `uniform:8` and the like stand for eight plans of that
            static method, whose costs are evenly spaced.
        layers: of the stack.
        seed: of the method `random`.
        read: plan text, or the name of a plan file, -> plan.

    Raises:
        UsageError: a part is no plan, names layers that the stack lacks, or asks for more levels
            than it has layers; or the menu has one level, or lacks the full model.
    """
    plans: list[Plan] = []
    for part in parsed(text, read):
        plans += [part] if isinstance(part, Plan) else _series(*part, layers=layers, seed=seed)
    return menu_of(plans, layers)


def parsed(text: str, read: Callable[[str], Plan]) -> list[Plan | tuple[str, int]]:
    """The parts of a menu: plans, and series of so many levels; raises as `read_menu`."""
    found: list[Plan | tuple[str, int]] = []
    for part in filter(None, map(str.strip, text.split(","))):
        series = _SERIES.fullmatch(part)
        if series is None or series["method"] == "all":
            found.append(read(part))
            continue
        if series["method"] not in STATIC:
            raise unknown("series of plans", series["method"], STATIC)
        found.append((series["method"], int(series["levels"])))
    return found


def menu_of(plans: Sequence[Plan], layers: int) -> Menu:
    """The menu of these plans; the same plan twice is one level. Raises as `read_menu`."""
    levels = {str(level.plan): level for level in (_level(plan, layers) for plan in plans)}
    if not any(_is_full(level.plan, layers) for level in levels.values()):
        raise UsageError(
            f"the menu lacks the full model, which its levels are compared with; add 'all' to "
            f"--menu ({', '.join(levels) or 'it is empty'})."
        )
    if len(levels) < 2:
        raise UsageError(
            "the menu has one level, so there is nothing to choose; give more plans, such as "
            f"--menu 'uniform:{min(layers, 8)}'."
        )
    ordered = sorted(levels.values(), key=lambda level: (level.cost, level.text))
    return Menu(tuple(ordered), layers)


def _series(method: str, levels: int, *, layers: int, seed: int) -> list[Plan]:
    if not 2 <= levels <= layers:
        raise UsageError(
            f"'{method}:{levels}' asks for {levels} levels of a stack of {layers} layers; give 2 "
            f"to {layers}."
        )
    # level / levels as a share of the layers: evenly spaced costs, the last one the full model.
    return [static_plan(method, layers, level / levels, seed) for level in range(1, levels + 1)]


def _level(plan: Plan, layers: int) -> Level:
    visits = plan.for_layers(layers)
    named = Plan(visits)
    return Level(named, str(named), sum(visits))


def _is_full(plan: Plan, layers: int) -> bool:
    return plan.for_layers(layers) == (1,) * layers
