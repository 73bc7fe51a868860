"""Quarantine lists: rows that a check has found damaged, which training skips and counts.

One JSON object per line: first the size of each source's files, then source, row, reason and
detail of each damaged row. The sizes tell whether the list still speaks of the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trol.data.damage import KINDS
from trol.data.mixture_file import MixtureFile
from trol.data.writing import cache_folder, whole_file
from trol.errors import DataError


@dataclass(frozen=True)
class Damaged:
    """One row that cannot be trained on."""

    source: str
    row: int
    """Its number in the source, from 0."""
    reason: str
    """One of `trol.data.damage.KINDS`."""
    detail: str
    """What exactly is wrong, and what to do."""


def write_quarantine(path: Path, sizes: Mapping[str, int], damaged: Iterable[Damaged]) -> None:
    """Writes the list, whole or not at all; `sizes` are the bytes of each source's files."""
    with whole_file(path) as file:
        file.write(json.dumps({"sizes": dict(sizes)}) + "\n")
        file.writelines(json.dumps(asdict(one)) + "\n" for one in damaged)


def read_quarantine(path: Path, sizes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Source -> row -> reason; nothing where there is no such file.

    Raises:
        DataError: the list is damaged, or was made for files of other sizes.
    """
    if not path.exists():
        return {}
    listed: dict[str, dict[int, str]] = {}
    with path.open(encoding="utf-8") as lines:
        try:
            known = json.loads(next(lines))["sizes"]
            for line in lines:
                one = Damaged(**json.loads(line))
                listed.setdefault(one.source, {})[int(one.row)] = one.reason
        except (ValueError, TypeError, KeyError, StopIteration) as broken:
            raise _stale(path, "is no quarantine list") from broken
    for source, size in sizes.items():
        if source in known and known[source] != size:
            raise _stale(path, f"was written when {source} had another size")
    if odd := {reason for rows in listed.values() for reason in rows.values()} - set(KINDS):
        raise _stale(path, f"has the unknown reason {sorted(odd)[0]!r}")
    return listed


def quarantine_path(described: MixtureFile) -> Path:
    """Where a mixture's quarantine list lies unless another is named.

    One that lies beside the data is theirs, whoever put it there; or else it is in trol's cache,
    by the mixture's file and root, so that data may lie where nobody but their owner writes.
    """
    beside = described.root / f"{described.path.stem}.quarantine.jsonl"
    if beside.exists():
        return beside
    places = f"{described.path.resolve()}\n{described.root.resolve()}"
    mark = hashlib.sha256(places.encode()).hexdigest()[:16]
    return cache_folder() / "quarantine" / f"{described.path.stem}-{mark}.jsonl"


def _stale(path: Path, why: str) -> DataError:
    return DataError(f"{path} {why}; delete it and run `trol data check` again.")
