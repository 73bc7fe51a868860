"""Where the time of a pass goes: operator by operator, beside the bare host's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from trol.depth import AbstractPolicy, attach
from trol.errors import unknown
from trol.evaluation.bench.hosts import host, twin
from trol.evaluation.bench.rows import ROWS, row_plans
from trol.evaluation.bench.setting import Setting
from trol.evaluation.timing import time_forward
from trol.policies.mixer import TrolMixer
from trol.policies.plain import Plain
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens
from trol.policies.static_plans import static_plan

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
