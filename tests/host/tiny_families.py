"""Tiny random models of families that are not in the zoo."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LFM2 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention"] * 2,
}
HYPERCLOVA = {"num_hidden_layers": 2, "num_key_value_heads": 2, "logits_scaling": 0.25}


@torch.no_grad()
def random_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A tiny model whose weights are large enough that every layer matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.copy_(torch.randn_like(weight) * 1.2 / weight[0].numel() ** 0.5)
    return model
