"""Rows of a batch with different plans: each layer takes the time of the rows that visit it.

    limit = fixed(8) + sum over layers l of layer(n_l)       n_l: how many of eight rows visit l

Eight plans, each of its own half of the layers, fixed for the whole sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from trol.depth import Plan, attach
from trol.depth.host import executor
from trol.evaluation.bench.hosts import host, twin
from trol.evaluation.bench.limits import HostTimes, limit_of
from trol.evaluation.bench.row import Row, phase_of, row
from trol.evaluation.bench.setting import Setting
from trol.evaluation.timing import Timing, interleaved, time_generate
from trol.policies.planned import Planned
from trol.policies.static_plans import static_plan

ROWS = 8
MUST = 1.20
EXECUTORS = {"own plans": True, "own plans, dense": False}
"""Case -> whether it has a bound; without one it is told for comparison."""


@torch.no_grad()
def rows(setting: Setting, rounds: int) -> list[Row]:
    """Prefill and decoding of eight rows by eight plans."""
    layers = setting.size.layers
    plans = row_plans(layers)
    visiting = Counter(sum(one) for one in zip(*(p.for_layers(layers) for p in plans), strict=True))
    bare = host(setting)
    empty, planned = attach(twin(bare), "exit@0"), attach(twin(bare), Planned(plans))
    runs: dict[str, Callable[[], Timing]] = {
        "own plans": _generate(planned, setting, ROWS),
        "own plans, dense": _dense(planned, setting),
    }
    numbers = sorted({ROWS, *visiting} - {0})
    for number in numbers:
        runs[f"bare {number}"] = _generate(bare, setting, number)
        runs[f"fixed {number}"] = _generate(empty, setting, number)
    times = interleaved(runs, rounds=rounds)
    return [
        made
        for phase in ("prefill", "decode")
        for made in _phase_rows(times, phase, numbers, visiting, setting)
    ]


def row_plans(layers: int) -> list[Plan]:
    """A plan for each row, each keeping its own half of the layers."""
    return [static_plan("random", layers, 0.5, seed) for seed in range(ROWS)]


def _generate(model: Any, setting: Setting, number: int) -> Callable[[], Timing]:
    inputs = {"input_ids": setting.ids(number, setting.size.prompt)}
    return lambda: time_generate(model, inputs, setting.size.new_tokens)


def _dense(model: Any, setting: Setting) -> Callable[[], Timing]:
    run = _generate(model, setting, ROWS)

    def dense() -> Timing:
        with executor(model, "dense"):
            return run()

    return dense


def _phase_rows(
    times: dict[str, list[Timing]],
    phase: str,
    numbers: list[int],
    visiting: Counter[int],
    setting: Setting,
) -> list[Row]:
    own = {
        number: HostTimes(
            phase_of(times[f"bare {number}"], phase),
            phase_of(times[f"fixed {number}"], phase),
            setting.size.layers,
        )
        for number in numbers
    }
    return [
        row(
            f"{name}, {phase} b{ROWS} t{setting.size.prompt}",
            own[ROWS].whole,
            phase_of(times[name], phase),
            limit_of(own, ROWS, visiting),
            limit="every layer for the rows that visit it",
            must=setting.must(MUST) if bound else None,
        )
        for name, bound in EXECUTORS.items()
    ]
