"""Benchmark suites, each of which holds measured times against limits.

May import every room but `reports` and `cli`.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trol.bench import suites
from trol.bench.cases import Row
from trol.bench.opening import load
from trol.bench.operators import launch
from trol.bench.setting import Setting
from trol.errors import UntrainedWarning, UsageError, unknown


@dataclass(frozen=True)
class Suite:
    """What a suite measures, how often, and where it cannot be measured."""

    measure: Callable[[Setting, int], list[Row]]
    rounds: int
    """Rounds, unless the setting says otherwise."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """A dtype or device that the suite cannot be measured at -> why, and what to do."""

    def refusal(self, setting: Setting) -> str | None:
        """Why the suite cannot be measured at this setting; None where it can."""
        return self.unfit.get(setting.dtype) or self.unfit.get(setting.device)


SUITES = {
    "overhead": Suite(suites.overhead, 9),
    "traverse": Suite(suites.traverse, 25),
    "skip": Suite(suites.skip, 9),
    "rows": Suite(suites.rows, 7),
    "sparse": Suite(suites.sparse, 15),
    "launch": Suite(launch, 9, {"nf4": "its host is too narrow for four bits; give float32"}),
    "speculate": Suite(suites.speculate, 7),
    "train": Suite(suites.train, 7, {"nf4": "nf4 weights have no gradients; give float32 or bf16"}),
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
            warnings.simplefilter("ignore", UntrainedWarning)  # values of gates take no time
            rows = SUITES[suite].measure(setting, rounds)
    finally:
        torch.set_num_threads(threads)
    return {"suite": suite, **setting.record(), "rounds": rounds, "rows": rows}


__all__ = ["SUITES", "Row", "Setting", "Suite", "check_suites", "run"]
