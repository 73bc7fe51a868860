"""Skipping is real: a layer that a whole batch skips takes no time.

With t_0 the time without any layers (embedding, norm and head) and t the bare host's,

    limit = t_0 + (t - t_0) / 2                       half of the layers skipped by all tokens
    limit = t_0 + (t - t_0) (1 + c) / 2               skipped by answers, whose keys are still made

where c is the share of a visit's FLOPs that makes keys and values.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch

from trol.depth import attach, cost_of
from trol.evaluation.bench_rows import Row, limited_row, llama
from trol.evaluation.timing import Timing, interleaved, time_generate
from trol.policies.planned import Planned
from trol.policies.static_plans import static_plan

HIDDEN, LAYERS = 512, 12
PROMPTS = (32, 512)
BATCHES = (1, 8)
NEW_TOKENS = 16
MUST = {"all": 1.1, "answer": 1.2}
"""Scope -> largest ratio of what is measured to its limit. FLOPs do not tell that a layer entered
for its keys makes half of the calls of a visit, each of which takes its time in so small a model.
"""


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


def keys_share(model: Any, past: int) -> float:
    """FLOPs of leaving keys and values, to those of a visit after `past` tokens."""
    layer = cost_of(model).layers[0]
    assert layer is not None
    assert layer.keys_per_token is not None  # a Llama's are known
    return layer.keys_per_token / layer.flops(rows=1, tokens=1, past=past, images=False)


def _rows(models: dict[str, Any], kept: float, batch: int, prompt: int, rounds: int) -> list[Row]:
    ids = torch.randint(3, models["bare"].config.vocab_size, (batch, prompt))
    runs = {
        name: lambda model=model: time_generate(model, {"input_ids": ids}, NEW_TOKENS)
        for name, model in models.items()
    }
    times = interleaved(runs, rounds=rounds)
    still = kept + (1 - kept) * keys_share(models["answer"], prompt)
    cases = (("all", "prefill", kept), ("all", "decode", kept), ("answer", "decode", still))
    return [
        _row(f"{name} {phase} b{batch} t{prompt}", times, name, phase, share)
        for name, phase, share in cases
    ]


def _row(case: str, times: dict[str, list[Timing]], name: str, phase: str, share: float) -> Row:
    """`share` of the layers' time beside what is left without layers."""
    bare, none, measured = ([getattr(t, phase) for t in times[n]] for n in ("bare", "none", name))
    limits = [t0 + share * (t - t0) for t0, t in zip(none, bare, strict=True)]
    return limited_row(case, bare, measured, limits_ms=limits, must=MUST[name])
