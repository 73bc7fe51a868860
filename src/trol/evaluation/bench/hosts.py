"""The random decoders that suites measure, built only where they fit."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trol.evaluation.bench.setting import DTYPES, Setting, Size
from trol.family.memory import check_fits
from trol.family.published.quantisation import quantised

CURE = "take --size small, a narrower --dtype, or a device with more"


def host(setting: Setting, *, layers: int | None = None, training: bool = False) -> Any:
    """A random Llama, sdpa, in evaluation mode; the same weights on every call.

    Raises:
        HostError: it does not fit the memory at hand; nothing was built then.
    """
    config = _config(setting.size, layers or setting.size.layers)
    what = f"a host of size {setting.size.name!r} in {setting.dtype}"
    check_fits(what, needed_bytes(setting, config, training=training), setting.device, CURE)
    torch.manual_seed(0)
    with torch.device(setting.device):
        made = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[setting.dtype], attn_implementation="sdpa"
        )
    if setting.dtype == "nf4":
        made = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=made.state_dict(),
            dtype=DTYPES[setting.dtype],
            device_map=setting.device,
            quantization_config=quantised(4, DTYPES[setting.dtype]),
        )
    return made.eval()


def needed_bytes(setting: Setting, config: Any, *, training: bool = False) -> int:
    """At least what the weights, and in training their gradients, take while they are made.

    Four bits are made of the same weights in bfloat16, so these must fit as well.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    width = DTYPES[setting.dtype].itemsize + (0.5 if setting.dtype == "nf4" else 0)
    return int(weights * width) * (2 if training else 1)


def twin(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _config(size: Size, layers: int) -> LlamaConfig:
    heads = size.heads or size.hidden // 64
    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size.kv_heads or heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
