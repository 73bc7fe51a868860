"""A layer that a whole batch skips takes no time; skipped by answers, that of its keys and values.

    limit = a bare host of as many layers as are kept       the others skipped by all tokens
    limit = (t + t_k) / 2                                   half of them skipped by answers alone

where t is the bare host's time and t_k the time with every layer skipped by answers, which leave
their keys and values in each.
"""

from __future__ import annotations

from typing import Any

import torch

from trol.depth import attach
from trol.evaluation.bench.hosts import host, twin
from trol.evaluation.bench.limits import HostTimes, limit_of
from trol.evaluation.bench.row import Row, phase_of, row
from trol.evaluation.bench.setting import Setting
from trol.evaluation.timing import Timing, generated
from trol.policies.planned import Planned
from trol.policies.static_plans import static_plan

MUST = {"all": 1.05, "answer": 1.1}
"""Scope -> the largest ratio of what is measured to its limit."""

LIMITS = {
    "all": "a bare host of the layers kept",
    "answer": "fixed part, layers kept, keys and values of the others",
}


@torch.no_grad()
def skip(setting: Setting, rounds: int) -> list[Row]:
    """Half of a Llama's layers skipped, evenly spaced."""
    layers = setting.size.deep
    bare = host(setting, layers=layers)
    half = static_plan("uniform", layers, 0.5)
    kept = sum(half.for_layers(layers))
    models = {
        "bare": bare,
        "kept": host(setting, layers=kept),
        "all": attach(twin(bare), Planned(half)),
        "answer": attach(twin(bare), Planned(half, scope="answer")),
        "keys": attach(twin(bare), Planned("exit@0", scope="answer")),
    }
    return [
        row
        for shape in setting.shapes(8)
        for row in _rows(models, (kept, layers), setting, shape, rounds)
    ]


def _rows(
    models: dict[str, Any],
    kept: tuple[int, int],
    setting: Setting,
    shape: tuple[int, int],
    rounds: int,
) -> list[Row]:
    inputs, new_tokens = {"input_ids": setting.ids(*shape)}, setting.size.new_tokens
    times = generated(models, inputs, new_tokens, rounds=rounds)
    return [
        _row(times, scope, phase, kept, (f"{scope} {phase} b{shape[0]} t{shape[1]}", setting))
        for scope, phase in (("all", "prefill"), ("all", "decode"), ("answer", "decode"))
    ]


def _row(
    times: dict[str, list[Timing]],
    scope: str,
    phase: str,
    kept: tuple[int, int],
    told: tuple[str, Setting],
) -> Row:
    """`kept`: how many layers are run, of how many."""
    case, setting = told
    bare, least, measured = (phase_of(times[name], phase) for name in ("bare", "keys", scope))
    limits = phase_of(times["kept"], phase)
    if scope == "answer":
        limits = limit_of({1: HostTimes(bare, least, kept[1])}, 1, {1: kept[0]})
    must = setting.must(MUST[scope])
    return row(case, bare, measured, limits, limit=LIMITS[scope], must=must)
