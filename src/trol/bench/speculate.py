"""Drafts that are always right: how near the loop comes to the passes that it makes.

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

from trol.bench.setting import Row, Setting, figure_row, host, row, twin
from trol.depth import attach
from trol.evaluation.timing import interleaved, now, time_forward, time_generate
from trol.host.names import CACHE
from trol.speculation import speculate as drafting

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
