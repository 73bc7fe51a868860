"""Tokens that choose: the time of a pass goes with how many of them visit a layer.

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

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from trol.depth import AbstractPolicy, attach
from trol.depth.host import executor
from trol.evaluation.bench.hosts import host, twin
from trol.evaluation.bench.limits import HostTimes, limit_of
from trol.evaluation.bench.row import Row, row
from trol.evaluation.bench.setting import TINY, Setting
from trol.evaluation.timing import interleaved, time_forward
from trol.policies.random_tokens import RandomTokens

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
