"""Benchmark suites: what each promises is a ratio of measured time to the limit beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trol.bench.load import load
from trol.bench.overhead import launch, overhead
from trol.bench.setting import Row, Setting
from trol.bench.skipping import rows, skip, sparse
from trol.bench.traverse import speculate, train, traverse
from trol.errors import UntrainedWarning, UsageError, unknown


@dataclass(frozen=True)
class Suite:
    """One file of this package."""

    measure: Callable[[Setting, int], list[Row]]
    rounds: int
    """Rounds, unless the setting says otherwise."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """A dtype or device that the suite cannot be measured at -> why, and what to do."""

    def refusal(self, setting: Setting) -> str | None:
        """Why the suite cannot be measured at this setting; None where it can."""
        return self.unfit.get(setting.dtype) or self.unfit.get(setting.device)


SUITES = {
    "overhead": Suite(overhead, 9),
    "traverse": Suite(traverse, 25),
    "skip": Suite(skip, 9),
    "rows": Suite(rows, 7),
    "sparse": Suite(sparse, 15),
    "launch": Suite(launch, 9, {"nf4": "its host is too narrow for four bits; give float32"}),
    "speculate": Suite(speculate, 7),
    "train": Suite(train, 7, {"nf4": "nf4 weights have no gradients; give float32 or bf16"}),
    "load": Suite(load, 5, {"cuda": "it measures this machine's own memory; give cpu"}),
}


def check_suites(names: list[str]) -> None:
    """Raises `UsageError` for a name that is no suite's."""
    for name in names:
        if name not in SUITES:
            raise unknown("suite", name, [*SUITES, "all"])


def run(suite: str, setting: Setting | None = None) -> dict[str, Any]:
    """Runs one suite in this process: `{"suite", "size", "dtype", ..., "rounds", "rows"}`.

    Raises:
        UsageError: there is no such suite, or the setting is not possible here.
        HostError: the host does not fit the memory at hand.
    """
    check_suites([suite])
    setting = setting or Setting()
    setting.check()
    if refusal := SUITES[suite].refusal(setting):
        raise UsageError(f"the suite {suite!r} cannot be measured so: {refusal}.")
    rounds = setting.rounds or SUITES[suite].rounds
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedWarning)  # what gates hold takes no time
            measured = SUITES[suite].measure(setting, rounds)
    finally:
        torch.set_num_threads(threads)
    return {"suite": suite, **setting.record(), "rounds": rounds, "rows": measured}


__all__ = ["SUITES", "Row", "Setting", "Suite", "check_suites", "run"]
