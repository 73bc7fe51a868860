"""Skipping is real: a layer that a whole batch skips takes no time.

With t the bare host's time and t_0 the time without any layers (embedding, norm and head),

    limit = (t + t_0) / 2         half of the layers skipped by all tokens
    limit = (t + t_k) / 2         skipped by answers alone, which leave their keys and values

where t_k is the time with every layer skipped by answers.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch

from trol.depth import attach
from trol.evaluation.bench_rows import Row, limited_row, llama
from trol.evaluation.timing import Timing, interleaved, time_generate
from trol.policies.planned import Planned
from trol.policies.static_plans import static_plan

HIDDEN, LAYERS = 512, 12
PROMPTS = (32, 512)
BATCHES = (1, 8)
NEW_TOKENS = 16
MUST = 1.1
"""Largest ratio of what is measured to its limit."""

NOTHING_LEFT = {"all": "none", "answer": "keys"}
"""Scope -> the model that skips every layer so."""


@torch.no_grad()
def skip(rounds: int) -> list[Row]:
    """Half of a Llama's layers skipped, evenly spaced: hidden size 512, 12 layers, float32."""
    bare = llama(hidden=HIDDEN, layers=LAYERS)
    layers = bare.config.num_hidden_layers
    half = static_plan("uniform", layers, 0.5)
    models = {
        "bare": bare,
        "none": attach(twin(bare), "exit@0"),
        "all": attach(twin(bare), Planned(half)),
        "answer": attach(twin(bare), Planned(half, scope="answer")),
        "keys": attach(twin(bare), Planned("exit@0", scope="answer")),
    }
    kept = sum(half.for_layers(layers)) / layers
    return [
        row
        for batch in BATCHES
        for prompt in PROMPTS
        for row in _rows(models, kept, batch, prompt, rounds)
    ]


def twin(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _rows(models: dict[str, Any], kept: float, batch: int, prompt: int, rounds: int) -> list[Row]:
    ids = torch.randint(3, models["bare"].config.vocab_size, (batch, prompt))
    runs = {
        name: lambda model=model: time_generate(model, {"input_ids": ids}, NEW_TOKENS)
        for name, model in models.items()
    }
    times = interleaved(runs, rounds=rounds)
    return [
        _row(f"{scope} {phase} b{batch} t{prompt}", times, scope, phase, kept)
        for scope, phase in (("all", "prefill"), ("all", "decode"), ("answer", "decode"))
    ]


def _row(case: str, times: dict[str, list[Timing]], scope: str, phase: str, kept: float) -> Row:
    """`kept`: the share of the layers that are run."""
    names = ("bare", NOTHING_LEFT[scope], scope)
    bare, least, measured = ([getattr(t, phase) for t in times[name]] for name in names)
    limits = [low + kept * (high - low) for low, high in zip(least, bare, strict=True)]
    return limited_row(case, bare, measured, limits_ms=limits, must=MUST)
