"""A layer that a whole batch skips takes no time; skipped by answers, that of its keys and values.

    limit = a bare host of as many layers as are kept       the others skipped by all tokens
    limit = (t + t_k) / 2                                   half of them skipped by answers alone

where t is the bare host's time and t_k the time with every layer skipped by answers, which leave
their keys and values in each.

Rows of a batch with different plans: each layer takes the time of the rows that visit it.

    limit = fixed(8) + sum over layers l of layer(n_l)       n_l: how many of eight rows visit l

Eight plans, each of its own half of the layers, fixed for the whole sequence.

Tokens that choose: the time of a pass goes with how many of them visit a layer.

A random share of the tokens makes a second visit, or any visit at all, another share of them in
each layer, in one pass over a prompt. The share of a second visit that the chosen cost is

    extra = (time with a share - time of the bare host) / (time with all - time of the bare host)

and the limit of all else is, with s T of T tokens chosen,

    second visit   fixed(T) + L (layer(T) + layer(s T))
    skipping       fixed(T) + L layer(s T)

Where leaving tokens out would lose (nearly all of them chosen, or a small host), the executor that
the model takes by itself is held against the dense one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from trol.bench.setting import TINY, HostTimes, Row, Setting, host, limit_of, phase_of, row, twin
from trol.depth import AbstractPolicy, Plan, attach
from trol.depth.attachment import executor
from trol.evaluation.timing import Timing, generated, interleaved, time_forward, time_generate
from trol.policies.planned import Planned, static_plan
from trol.policies.random_tokens import RandomTokens

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


ROWS = 8
ROWS_MUST = 1.20
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
            must=setting.must(ROWS_MUST) if bound else None,
        )
        for name, bound in EXECUTORS.items()
    ]


AGAIN = {0.5: 0.62, 0.25: 0.48}
"""Share of the tokens that go again -> the most extra time, as a share of all tokens' extra."""

SKIPPING: dict[Literal["project", "hole"], float] = {"hole": 1.15, "project": 1.30}
"""What skipped tokens leave -> the largest ratio to the limit, at half of the tokens."""

CROWDED, AS_DENSE = (0.9, 0.95), 1.05
"""Shares at which leaving tokens out may lose, and how much may be lost."""

Runs = dict[str, Callable[[], float]]


@torch.no_grad()
def sparse(setting: Setting, rounds: int) -> list[Row]:
    """A Llama, one prompt, one pass."""
    bare, tokens = host(setting), setting.size.prompt
    chosen = {share: round(share * tokens) for share in AGAIN}
    policies: dict[str, AbstractPolicy | str] = {"all again": "all:2"}
    policies |= {f"again {share:g}": RandomTokens(share, visit=2, scope="all") for share in AGAIN}
    policies |= {
        f"skip {kind}": RandomTokens(0.5, visit=1, scope="all", skipped_kv=kind)
        for kind in SKIPPING
    }
    models = {name: attach(twin(bare), policy) for name, policy in policies.items()}
    empty = attach(twin(bare), "exit@0")
    runs: Runs = {name: _pass(model, setting, tokens) for name, model in models.items()}
    for number in (tokens, *chosen.values()):
        runs[f"bare {number}"] = _pass(bare, setting, number)
        runs[f"fixed {number}"] = _pass(empty, setting, number)
    times = interleaved(runs, rounds=rounds)
    own = {
        number: HostTimes(times[f"bare {number}"], times[f"fixed {number}"], setting.size.layers)
        for number in (tokens, *chosen.values())
    }
    rows = [
        one for share in AGAIN for one in _again_rows(times, own, share, chosen[share], setting)
    ]
    rows += [_skip_row(times, own, chosen[0.5], kind, setting) for kind in SKIPPING]
    return rows + _dense_rows(bare, setting, rounds)


def _pass(model: Any, setting: Setting, tokens: int) -> Callable[[], float]:
    ids = setting.ids(1, tokens)
    return lambda: time_forward(model, ids)


def _again_rows(
    times: dict[str, list[float]],
    own: dict[int, HostTimes],
    share: float,
    chosen: int,
    setting: Setting,
) -> list[Row]:
    """The extra time to that of all tokens, and the whole time to its limit."""
    tokens, layers = setting.size.prompt, setting.size.layers
    plain, measured = own[tokens].whole, times[f"again {share:g}"]
    case = f"second visit of {share:.0%} b1 t{tokens}"
    return [
        row(
            f"{case}, extra time",
            plain,
            _beyond(measured, plain),
            _beyond(times["all again"], plain),
            limit="extra time of a second visit of all",
            must=setting.must(AGAIN[share]),
        ),
        row(
            case,
            plain,
            measured,
            limit_of(own, tokens, {tokens: layers, chosen: layers}),
            limit="visits made; keys and values of the others free",
            must=None,
        ),
    ]


def _skip_row(
    times: dict[str, list[float]],
    own: dict[int, HostTimes],
    chosen: int,
    kind: Literal["project", "hole"],
    setting: Setting,
) -> Row:
    tokens = setting.size.prompt
    return row(
        f"50% skipped, {kind} b1 t{tokens}",
        own[tokens].whole,
        times[f"skip {kind}"],
        limit_of(own, tokens, {chosen: setting.size.layers}),
        limit="visits made; keys and values of the others free",
        must=setting.must(SKIPPING[kind]),
    )


def _dense_rows(bare: Any, setting: Setting, rounds: int) -> list[Row]:
    """What the model takes by itself, to the dense executor, where choosing would lose."""
    own, small = replace(setting, rounds=None), replace(setting, size=TINY)
    cases = [(bare, own, share, rounds) for share in CROWDED]
    if setting.size.short is not None:
        # Passes of milliseconds: more rounds cost nothing, and one hiccup is more of each.
        cases += [(host(small), small, 0.5, 5 * rounds)]
    return [_dense_row(*case, setting.must(AS_DENSE)) for case in cases]


def _dense_row(bare: Any, setting: Setting, share: float, rounds: int, must: float | None) -> Row:
    tokens = setting.size.prompt
    model = attach(twin(bare), RandomTokens(share, visit=2, scope="all"))
    run = _pass(model, setting, tokens)

    def dense() -> float:
        with executor(model, "dense"):
            return run()

    runs = {"bare": _pass(bare, setting, tokens), "auto": run, "dense": dense}
    times = interleaved(runs, rounds=rounds)
    return row(
        f"second visit of {share:.0%} b1 t{tokens} h{setting.size.hidden}, as dense",
        times["bare"],
        times["auto"],
        times["dense"],
        limit="the dense executor",
        must=must,
    )


def _beyond(times: list[float], plain: list[float]) -> list[float]:
    return [one - other for one, other in zip(times, plain, strict=True)]
