"""What suites share: the rows that they give, and the decoder that they measure."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trol.evaluation.timing import ratio_and_spread

Row = dict[str, Any]
"""`{"case", "baseline_ms", "measured_ms", "limit_ms", "ratio", "spread", "must"}`."""


def row(
    case: str, baseline_ms: list[float], measured_ms: list[float], *, visits: int, must: float
) -> Row:
    """A row whose ratio is measured / baseline, of layers that are visited `visits` times."""
    ratio, spread = ratio_and_spread(baseline_ms, measured_ms)
    baseline = statistics.median(baseline_ms)
    return {
        "case": case,
        "baseline_ms": baseline,
        "measured_ms": statistics.median(measured_ms),
        "limit_ms": visits * baseline,
        "ratio": ratio,
        "spread": spread,
        "must": must,
    }


def limited_row(
    case: str,
    baseline_ms: list[float],
    measured_ms: list[float],
    *,
    limits_ms: list[float],
    must: float,
) -> Row:
    """A row whose ratio is measured / limit, round by round."""
    ratio, spread = ratio_and_spread(limits_ms, measured_ms)
    return {
        "case": case,
        "baseline_ms": statistics.median(baseline_ms),
        "measured_ms": statistics.median(measured_ms),
        "limit_ms": statistics.median(limits_ms),
        "ratio": ratio,
        "spread": spread,
        "must": must,
    }


def plain_row(case: str, ratio: float, *, must: float) -> Row:
    """A row of something that is no time."""
    times: Row = dict.fromkeys(("baseline_ms", "measured_ms", "limit_ms"))
    return {"case": case, **times, "ratio": ratio, "spread": 0.0, "must": must}


def llama(*, hidden: int, layers: int) -> Any:
    """A random Llama with heads of size 64, float32, sdpa; the same weights on every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=2048,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()
