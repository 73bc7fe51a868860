"""Which parts of a TroL model are quantised: the decoder's own linear maps, and nothing else."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from trol.errors import HostError, UsageError

NEVER = ("model.vision_tower", "model.projector", "lm_head", "depth", "image_down", "image_up")
"""Modules that keep their type: tower, projector, head, gates, and the LoRA of image tokens."""

BITS = (4, 8)


def quantised(bits: int, compute_dtype: torch.dtype = torch.float16) -> BitsAndBytesConfig:
    """As published: 4 bits (nf4, its scales quantised too) or 8 (int8, outliers above 6 apart).

    Raises:
        UsageError: another number of bits.
        HostError: bitsandbytes is not installed.
    """
    if bits not in BITS:
        raise UsageError(f"bits is {bits!r}; give 4 or 8, or leave it out for the full weights.")
    if find_spec("bitsandbytes") is None:
        raise HostError(
            f"weights of {bits} bits need bitsandbytes, which is not installed; "
            "run: pip install 'trol-vlm[quant]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_threshold=6.0,
        llm_int8_skip_modules=list(NEVER),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def spare_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a `from_pretrained`, in whose bitsandbytes configuration `NEVER` is spared.

    A configuration without a list of modules to skip would quantise tower, projector and gates.
    """
    given = settings.get("quantization_config")
    if isinstance(given, dict) and given.get("quant_method", "bitsandbytes") == "bitsandbytes":
        given = BitsAndBytesConfig.from_dict(given)
    if not isinstance(given, BitsAndBytesConfig):
        return settings
    made = copy.deepcopy(given)
    made.llm_int8_skip_modules = list(dict.fromkeys([*(given.llm_int8_skip_modules or []), *NEVER]))
    return {**settings, "quantization_config": made}
