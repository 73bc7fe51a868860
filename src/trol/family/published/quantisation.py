"""Which parts of a TroL model are quantised: the decoder's own linear maps, and nothing else."""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from trol.errors import HostError, UsageError

NEVER = ("model.vision_tower", "model.projector", "lm_head", "depth", "image_down", "image_up")
"""Modules that keep their type: tower, projector, head, gates, and the LoRA of image tokens."""

BITS = (4, 8)

BLOCK = 64
"""Weights that share a scale in 4 bits; a map's rows must be made of whole blocks."""
ROWS = 32
"""Rows that bitsandbytes packs together for a CPU."""

# bitsandbytes asks for a package that it does not need, in every process that imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "from kernels-community" not in str(record.msg)
)


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
    Eight bits compute in float16, which is the others' type unless the settings say one.
    """
    given = settings.get("quantization_config")
    if isinstance(given, dict) and given.get("quant_method", "bitsandbytes") == "bitsandbytes":
        given = BitsAndBytesConfig.from_dict(given)
    if not isinstance(given, BitsAndBytesConfig):
        return settings
    made = copy.deepcopy(given)
    made.llm_int8_skip_modules = list(dict.fromkeys([*(given.llm_int8_skip_modules or []), *NEVER]))
    own = {} if not made.load_in_8bit or "torch_dtype" in settings else {"dtype": torch.float16}
    return {**own, **settings, "quantization_config": made}


def check_blocks(model: nn.Module, name: str) -> None:
    """`HostError` where a 4-bit map has not the widths that bitsandbytes can compute with."""
    named: list[tuple[str, Any]] = list(model.named_modules())
    for place, module in named:
        if type(module).__name__ != "Linear4bit":
            continue
        rows, columns = module.out_features, module.in_features
        if rows % ROWS or columns % BLOCK:
            raise HostError(
                f"{name} cannot be used in 4 bits: its map {place!r} has the shape "
                f"[{rows}, {columns}], expected a multiple of {ROWS} rows and of {BLOCK} columns; "
                "take 8 bits (--bits 8, bits=8), or its full weights."
            )
