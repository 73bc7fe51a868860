"""The smallest real model, on which what is assumed is looked up."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_config(**settings: Any) -> LlamaConfig:
    """Two layers of eight numbers."""
    return LlamaConfig(**{**SIZES, **settings})


def tiny_model(cls: Any = LlamaForCausalLM, **settings: Any) -> Any:
    """A random Llama of this configuration, in evaluation mode; the caller's seed stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(tiny_config(**settings)).eval()


def ids(tokens: int = 4) -> torch.Tensor:
    """Token ids [1, tokens]."""
    return torch.arange(1, tokens + 1)[None]
