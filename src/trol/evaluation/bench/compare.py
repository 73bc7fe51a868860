"""Are the suites slower than they were? Ratios against stored ones, row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trol.errors import DataError, UsageError

FLOOR = 0.02
"""Ratios this near each other, as a share of the stored one, are taken for equal."""

SAME = ("size", "dtype", "device", "threads")
"""What must be the same for ratios to be comparable."""


@dataclass(frozen=True)
class Comparison:
    """One suite's ratios against the stored ones."""

    slower: list[str] = field(default_factory=list)
    """Rows whose ratio rose by more than both spreads and the floor together."""
    unsure: list[str] = field(default_factory=list)
    """Rows that look slower, where one of the two measurements is noisy."""
    lacking: list[str] = field(default_factory=list)
    """Stored rows that were not measured now."""


def compare(found: Mapping[str, Any], stored: Mapping[str, Any]) -> Comparison:
    """Slower means: ratio - stored ratio > spread + stored spread + 2 % of the stored ratio.

    Raises:
        UsageError: the two are not of one suite, or were measured on hosts of different size, type,
            device or threads.
    """
    if stored["suite"] != found["suite"]:
        raise UsageError(
            f"the stored results are of the suite {stored['suite']!r}, and these of "
            f"{found['suite']!r}; give the file, or the folder, that `--out` wrote for it."
        )
    for key in SAME:
        if key in stored and stored[key] != found[key]:
            raise UsageError(
                f"the stored results of {found['suite']} have {key} {stored[key]!r}, and these "
                f"{found[key]!r}; measure with the same --{key}."
            )
    rows = {row["case"]: row for row in found["rows"]}
    made = Comparison()
    for old in stored["rows"]:
        new = rows.get(old["case"])
        if new is None:
            made.lacking.append(f"{found['suite']}: {old['case']}")
        elif new["ratio"] - old["ratio"] > _tolerance(new, old):
            uncertain = new["noisy"] or old.get("noisy", False)
            (made.unsure if uncertain else made.slower).append(_told(found["suite"], new, old))
    return made


def read_stored(against: Path, name: str) -> dict[str, Any] | None:
    """A stored result: the file itself, or `name`.json in a folder; None where it is not there.

    Raises:
        DataError: the file is no result of `trol bench`.
    """
    file = against / f"{name}.json" if against.is_dir() else against
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}); give what `trol bench --out` wrote.") from (
            error
        )
    if not isinstance(stored, dict) or not {"suite", "rows"} <= stored.keys():
        raise DataError(f"{file} is no result of a suite; give what `trol bench --out` wrote.")
    return stored


def _tolerance(new: Mapping[str, Any], old: Mapping[str, Any]) -> float:
    return new["spread"] + old["spread"] + FLOOR * abs(old["ratio"])


def _told(suite: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    was, now = (f"{row['ratio']:.3f} ± {row['spread']:.3f}" for row in (old, new))
    return f"{suite}: {new['case']}: {now}, was {was}"
