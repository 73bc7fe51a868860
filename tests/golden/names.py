"""Upstream's parameter names: which of trol's tensors they are, split and fused as needed.

Written from the layout alone and independent of the code that loads published checkpoints, so
that gradients check the loading too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[nn.Parameter], Tensor | None]
"""What is wanted of a parameter: its value, or its gradient."""

LORA = {"ffn": "base", "lora_A": "image_down", "lora_B": "image_up"}
LINEARS = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GATE = re.compile(r"^(?:language_model\.)?model\.trol_gating\.(\d+)\.(weight|bias)$")
WQKV = re.compile(r"^model\.layers\.(\d+)\.attention\.wqkv\.(ffn|lora_A|lora_B)\.weight$")
LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)\.weight$")
PROJECTOR = re.compile(r"^vision_proj\.(\d+)\.(weight|bias)$")


def reader(model: Any, read: Read) -> Callable[[str], Tensor | None]:
    """A function from upstream's parameter names to trol's tensors; None where there is none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    text = model.config.text_config

    def of(name: str) -> Tensor | None:
        fused = WQKV.match(name)
        if fused:
            prefix = f"model.language_model.layers.{fused[1]}.self_attn"
            names = [f"{prefix}.{x}_proj.{LORA[fused[2]]}.weight" for x in "qkv"]
            return _fused([read(parameters[one]) for one in names], fused[2], text)
        ours = parameters.get(ours_of(name, norm=model.config.projector_norm))
        return None if ours is None else read(ours)

    return of


def ours_of(name: str, *, norm: bool) -> str:
    """trol's name of an unfused parameter, or "" where upstream's is unknown."""
    if match := GATE.match(name):
        return f"model.language_model.layers.{match[1]}.depth.{match[2]}"
    if match := PROJECTOR.match(name):
        parts = ("norm", "linear_1", "", "linear_2") if norm else ("linear_1", "", "linear_2")
        return f"model.projector.{parts[int(match[1])]}.{match[2]}"
    if name.startswith("language_model."):  # Phi-3: transformers' names, within another prefix
        rest = name.removeprefix("language_model.")
        if rest.startswith("model."):
            return f"model.language_model.{rest.removeprefix('model.')}"
        return rest
    plain = {
        "model.tok_embeddings.weight": "model.language_model.embed_tokens.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    match = LAYER.match(name)
    return plain.get(name, "") if match is None else _in_layer(match[1], match[2])


def _in_layer(number: str, rest: str) -> str:
    prefix = f"model.language_model.layers.{number}"
    if rest in NORMS:
        return f"{prefix}.{NORMS[rest]}.weight"
    linear, _, part = rest.rpartition(".")
    if linear not in LINEARS or part not in LORA:
        return ""
    return f"{prefix}.{LINEARS[linear]}.{LORA[part]}.weight"


def _fused(parts: list[Tensor | None], part: str, text: Any) -> Tensor | None:
    """q, k and v as one: rows grouped by kv head, [the group's q heads ..., k, v].

    Each of the three has a copy of the one A, whose gradient is therefore the sum of theirs.
    """
    some = [x for x in parts if x is not None]
    if not some:
        return None
    if part == "lora_A":
        return torch.stack(some).sum(0)
    heads, size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    grouped = [x.view(heads, -1, size, x.shape[-1]) for x in some]
    return torch.cat(grouped, dim=1).flatten(0, 2)
