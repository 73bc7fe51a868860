"""Traversal takes the time of its visits: two of a question's tokens, or of an answer's.

    answer's limit    = fixed(1) + 2 L layer(1)
    question's limit  = fixed(T) + 2 L layer(T)                in one pass over it
                      = fixed(T) + (2 L - 1) layer(T) + layer(1)    in `generate`, which reads
                        nothing above the last token of the last layer's last visit

A policy by which no token ever goes again is held against the bare host.

What a training step with a second visit for all tokens takes, to twice the step without.

Drafts that are always right: how near the loop comes to the passes that it makes.

The upper layers of the host are made idle, so that leaving before them changes next to nothing
and every draft is right. A round drafts k tokens and verifies them in one pass, which gives k + 1:

    limit = (t_prompt + (N - 1) (k t_draft + t_verify(k + 1)) / (k + 1)) / N

milliseconds of each of an answer's N tokens, where t_draft is one decoding step of the host that
leaves early, and t_prompt and t_verify(k + 1) are passes of the whole host, over the prompt and
over k + 1 tokens behind it. Being faster than plain decoding is a row of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from trol.bench.setting import (
    HostTimes,
    Row,
    Setting,
    figure_row,
    host,
    limit_of,
    memory_row,
    phase_of,
    row,
    scaled,
    twin,
)
from trol.depth import attach
from trol.depth.policy import Plain
from trol.depth.roles import IGNORED_LABEL
from trol.evaluation.timing import (
    Timing,
    generated,
    interleaved,
    now,
    time_forward,
    time_generate,
    time_step,
)
from trol.host.names import CACHE
from trol.policies.mixer import TrolMixer
from trol.speculation import speculate as drafting

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
        labels[:, : tokens // 2] = IGNORED_LABEL
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


DRAFTED = (2, 4, 6)
"""Tokens drafted in a round."""

NEW_TOKENS = 64
PROMPT = 32


@torch.no_grad()
def speculate(setting: Setting, rounds: int) -> list[Row]:
    """A Llama of which the upper three quarters do next to nothing."""
    model = idle_host(setting)
    early = f"exit@{working_layers(setting)}"
    ids = setting.ids(1, PROMPT)
    said: dict[str, torch.Tensor] = {}
    past = DynamicCache(config=model.config)
    model(ids, **{CACHE: past})
    draft = attach(twin(model), early)

    def plain() -> float:
        return _per_token(model, ids, said, "plain")

    def drafted(tokens: int) -> float:
        with drafting(model, early, tokens=tokens):
            return _per_token(model, ids, said, f"{tokens}")

    runs: dict[str, Any] = {"plain": plain, "draft": lambda: _step(draft, ids)}
    runs["prompt"] = lambda: time_forward(model, ids, head=True)
    for tokens in DRAFTED:
        runs[f"{tokens}"] = lambda tokens=tokens: drafted(tokens)
        runs[f"verify {tokens}"] = lambda tokens=tokens: _verify(model, past, setting, tokens)
    times = interleaved(runs, rounds=rounds)
    rows = [made for tokens in DRAFTED for made in _rows(times, tokens, setting)]
    unlike = max((said["plain"] != said[f"{k}"]).float().mean().item() for k in DRAFTED)
    case = "share of tokens unlike plain decoding"
    # Narrower types round differently in passes of other lengths.
    exact = 0.0 if setting.dtype == "float32" else None
    return [*rows, figure_row(case, unlike, limit="no token", must=exact)]


def idle_host(setting: Setting) -> Any:
    """A random Llama of which all layers but the lowest quarter do next to nothing."""
    model = host(setting, layers=setting.size.deep)
    for layer in model.model.layers[working_layers(setting) :]:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.mul_(1e-3)  # norms keep their type where linear maps have 4 bits
    return model


def working_layers(setting: Setting) -> int:
    """How many of the lowest layers of the idle host do anything."""
    return max(1, setting.size.deep // 4)


def _per_token(model: Any, ids: torch.Tensor, said: dict[str, torch.Tensor], name: str) -> float:
    """Milliseconds of each token of one answer."""
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    began = now(ids.device)
    said[name] = model.generate(ids, pad_token_id=0, do_sample=False, **lengths)
    return 1000 * (now(ids.device) - began) / NEW_TOKENS


def _step(draft: Any, ids: torch.Tensor) -> float:
    return time_generate(draft, {"input_ids": ids}, 16).decode


def _verify(model: Any, past: DynamicCache, setting: Setting, tokens: int) -> float:
    return time_forward(model, setting.ids(1, tokens + 1), copy.deepcopy(past), head=True)


def _rows(times: dict[str, list[float]], tokens: int, setting: Setting) -> list[Row]:
    plain, measured = times["plain"], times[f"{tokens}"]
    parts = zip(times["prompt"], times["draft"], times[f"verify {tokens}"], strict=True)
    limits = [
        (prompt + (NEW_TOKENS - 1) * (tokens * draft + verify) / (tokens + 1)) / NEW_TOKENS
        for prompt, draft, verify in parts
    ]
    case = f"{tokens} tokens a round"
    faster = row(case, plain, measured, plain, limit="plain decoding", must=setting.must(1.0))
    passes = f"{tokens} early exits and a pass over {tokens + 1}"
    return [faster, row(f"{case}, passes", plain, measured, limits, limit=passes, must=None)]
