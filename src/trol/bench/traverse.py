"""Traversal takes the time of its visits: two of a question's tokens, or of an answer's.

    answer's limit    = fixed(1) + 2 L layer(1)
    question's limit  = fixed(T) + 2 L layer(T)                in one pass over it
                      = fixed(T) + (2 L - 1) layer(T) + layer(1)    in `generate`, which reads
                        nothing above the last token of the last layer's last visit

A policy by which no token ever goes again is held against the bare host.

What a training step with a second visit for all tokens takes, to twice the step without.
"""

from __future__ import annotations

from typing import Any

import torch

from trol.bench.setting import (
    HostTimes,
    Row,
    Setting,
    host,
    limit_of,
    memory_row,
    phase_of,
    row,
    scaled,
    twin,
)
from trol.data.chat import IGNORED
from trol.depth import attach
from trol.depth.policy import Plain
from trol.evaluation.timing import Timing, generated, interleaved, time_forward, time_step
from trol.policies.mixer import TrolMixer

MUST = {"never": 1.02, "question": 1.03, "answer": 1.08}


@torch.no_grad()
def traverse(setting: Setting, rounds: int) -> list[Row]:
    """A Llama with a gate on each layer: prefill, decoding and, on a GPU, memory."""
    bare = host(setting)
    models = {
        "bare": bare,
        "fixed": attach(twin(bare), "exit@0"),
        "plain": attach(twin(bare), Plain()),
        "question": attach(twin(bare), TrolMixer()),
        "all": attach(twin(bare), TrolMixer(scope="all")),
    }
    whole = setting.size.prompt
    shapes = [shape for shape in setting.shapes(1) if shape[1] == whole]
    rows = _one_pass(models, setting, rounds)
    for shape in shapes:
        rows += _generated(models, setting, shape, rounds)
    return rows


def _one_pass(models: dict[str, Any], setting: Setting, rounds: int) -> list[Row]:
    tokens, layers = setting.size.prompt, setting.size.layers
    ids = setting.ids(1, tokens)
    runs = {
        name: lambda model=models[name]: time_forward(model, ids)
        for name in ("bare", "fixed", "question")
    }
    times = interleaved(runs, rounds=rounds)
    own = HostTimes(times["bare"], times["fixed"], layers)
    return [
        row(
            f"question in one pass b1 t{tokens}",
            times["bare"],
            times["question"],
            limit_of({tokens: own}, tokens, {tokens: 2 * layers}),
            limit="two visits of every token",
            must=setting.must(MUST["question"]),
        )
    ]


def _generated(
    models: dict[str, Any], setting: Setting, shape: tuple[int, int], rounds: int
) -> list[Row]:
    inputs, new_tokens = {"input_ids": setting.ids(*shape)}, setting.size.new_tokens
    times = generated(models, inputs, new_tokens, rounds=rounds)
    layers, named = setting.size.layers, f"b{shape[0]} t{shape[1]}"
    decode = _host_times(times, "decode", layers)
    prefill = _host_times(times, "prefill", layers)
    bare = {phase: phase_of(times["bare"], phase) for phase in ("prefill", "decode")}
    rows = [
        row(
            f"never again {phase} {named}",
            bare[phase],
            phase_of(times["plain"], phase),
            bare[phase],
            limit="the bare host",
            must=setting.must(MUST["never"]),
        )
        for phase in bare
    ]
    rows.append(
        row(
            f"question prefill {named}",
            bare["prefill"],
            phase_of(times["question"], "prefill"),
            limit_of({2: prefill, 1: decode}, 2, {2: 2 * layers - 1, 1: 1}),
            limit="two visits of every token, the last one of one token",
            must=setting.must(MUST["question"]),
        )
    )
    rows.append(
        row(
            f"answer decode {named}",
            bare["decode"],
            phase_of(times["all"], "decode"),
            limit_of({1: decode}, 1, {1: 2 * layers}),
            limit="two visits of every token",
            must=setting.must(MUST["answer"]),
        )
    )
    for one in rows:
        one["tokens_per_s"] = _speed(one, shape)
    memory = memory_row(f"question peak memory {named}", times["bare"], times["question"])
    return rows if memory is None else [*rows, memory]


def _host_times(times: dict[str, list[Timing]], phase: str, layers: int) -> HostTimes:
    whole, fixed = (phase_of(times[name], phase) for name in ("bare", "fixed"))
    return HostTimes(whole, fixed, layers)


def _speed(one: Row, shape: tuple[int, int]) -> float:
    """Tokens per second: of the prompt, or new ones."""
    rows, tokens = shape
    return 1000 * rows * (tokens if "prefill" in one["case"] else 1) / one["measured_ms"]


TRAIN_MUST = 1.025


def train(setting: Setting, rounds: int) -> list[Row]:
    """One loss and its gradients."""
    bare = host(setting, training=True).train()
    traversing = attach(twin(bare), TrolMixer())
    whole = setting.size.prompt
    rows = []
    for batch, tokens in ((1, whole), (4, whole // 2)):
        ids = setting.ids(batch, tokens)
        labels = ids.clone()
        labels[:, : tokens // 2] = IGNORED
        inputs = {"input_ids": ids, "labels": labels}
        times = interleaved(
            {
                "bare": lambda inputs=inputs: time_step(bare, inputs),
                "traversing": lambda inputs=inputs: time_step(traversing, inputs),
            },
            rounds=rounds,
        )
        case = f"all tokens b{batch} t{tokens}"
        limits, must = scaled(times["bare"], 2), setting.must(TRAIN_MUST)
        limit = "2 x the bare step"
        rows.append(row(case, times["bare"], times["traversing"], limits, limit=limit, must=must))
    return rows
