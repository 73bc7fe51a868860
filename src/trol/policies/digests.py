"""What a model is known by, in a few characters: its configuration, and its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

LOOKED_AT = 64
"""Numbers of a parameter that are looked at, from the first to the last."""

_NOT_THE_HOST = {
    "quantization_config",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "architectures",
    "_attn_implementation",
    "attn_implementation",
}
"""Configuration entries that do not change what the layers compute."""


def host_digest(decoder: Any) -> str:
    """Sixteen hexadecimal digits that name a decoder's configuration."""
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in _NOT_THE_HOST}
    return text_digest(json.dumps(config, sort_keys=True, default=str))[:16]


def weights_digest(model: nn.Module) -> str:
    """Of a model: names and shapes of its parameters, and some numbers of each."""
    parts = []
    for name, parameter in model.named_parameters():
        step = max(1, parameter.numel() // LOOKED_AT)
        some = parameter.detach().flatten()[::step]
        parts.append(f"{name} {tuple(parameter.shape)} {parameter.dtype} {numbers_digest(some)}")
    return text_digest("\n".join(parts))


def numbers_digest(values: Tensor) -> str:
    """Of a tensor's shape and numbers."""
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(values.shape)}{hashlib.sha256(raw).hexdigest()}"


def text_digest(text: str) -> str:
    """Thirty-two hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
