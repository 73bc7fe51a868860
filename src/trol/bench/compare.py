"""Are the suites slower than they were? Ratios against stored ones, row by row.

Where the time of a pass goes: operator by operator, beside the bare host's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from trol.bench.setting import Setting, host, twin
from trol.bench.skipping import ROWS, row_plans
from trol.depth import AbstractPolicy, attach
from trol.depth.policy import Plain
from trol.errors import DataError, UsageError, unknown
from trol.evaluation.timing import time_forward
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned, static_plan
from trol.policies.random_tokens import RandomTokens

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


POLICIES: dict[str, tuple[int, Callable[[int], AbstractPolicy]]] = {
    "overhead": (1, lambda _: Plain()),
    "traverse": (1, lambda _: TrolMixer()),
    "skip": (1, lambda layers: Planned(static_plan("uniform", layers, 0.5))),
    "rows": (ROWS, lambda layers: Planned(row_plans(layers))),
    "sparse": (1, lambda _: RandomTokens(0.5)),
}
"""Suite -> rows of the prompt, and the policy of its pass, given the number of layers."""


class Operator(NamedTuple):
    """What one operator took in one pass, without the operators that it called."""

    name: str
    calls: int
    ms: float
    bare_calls: int
    bare_ms: float


@torch.no_grad()
def profiled(suite: str, setting: Setting) -> list[Operator]:
    """The operators of one pass over a whole prompt, those first that took the most time.

    Raises:
        UsageError: the suite has no pass of its own.
    """
    if suite not in POLICIES:
        raise unknown("suite with a profile", suite, POLICIES)
    setting.check()
    rows, policy = POLICIES[suite]
    bare, ids = host(setting), setting.ids(rows, setting.size.prompt)
    measured = _operators(attach(twin(bare), policy(setting.size.layers)), ids)
    plain = _operators(bare, ids)
    made = [Operator(name, *measured[name], *plain.get(name, (0, 0.0))) for name in measured]
    return sorted(made, key=lambda one: -one.ms)


def _operators(model: Any, ids: torch.Tensor) -> dict[str, tuple[int, float]]:
    """Operator -> calls and milliseconds, on the GPU where there is one; after a first pass."""
    time_forward(model, ids)
    gpu = ids.device.type == "cuda"
    watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=watched) as seen:
        time_forward(model, ids)
    which = "self_device_time_total" if gpu else "self_cpu_time_total"
    return {one.key: (one.count, getattr(one, which) / 1000) for one in seen.key_averages()}
