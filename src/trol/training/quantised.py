"""Quantised weights in training: which parts are, and gradients that pass through them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from trol.errors import HostError
from trol.family.published.quantisation import quantised
from trol.training.parts import NOT_DECODER, part_of


def quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with double quantisation (4) or int8 (8) for the decoder of any host.

    Projector, vision tower, head and gates keep their type. Raises as `quantised`.
    """
    made = quantised(bits, compute_dtype=dtype)
    # transformers reads an entry as a regular expression for a beginning of the module's name.
    others = [rf"(?:.*\.)?{name.replace('.', chr(92) + '.')}" for name in NOT_DECODER]
    made.llm_int8_skip_modules = [*(made.llm_int8_skip_modules or []), *others]
    return made


def is_quantised(model: nn.Module) -> bool:
    """Whether some weight is kept in whole numbers."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def check_quantised(model: nn.Module) -> None:
    """Raises `HostError` unless exactly the decoder has quantised weights."""
    parts = {part_of(n) for n, p in model.named_parameters() if not p.is_floating_point()}
    if parts != {"decoder"}:
        raise HostError(
            f"{type(model).__name__} was to have a quantised decoder and nothing else quantised, "
            f"but quantised are: {sorted(parts) or 'none'}; train it with bits=0."
        )


def let_gradients_through(model: nn.Module) -> None:
    """Makes 4-bit maps on a CPU differentiable, whatever runs before; call it before training.

    bitsandbytes (0.50) repacks a 4-bit weight in the first evaluation on a CPU with AVX512-BF16,
    and from then on multiplies by a kernel without a gradient: all below it would stop learning,
    with no more than a warning. Packed weights are unpacked here, and none is packed later.
    """
    for module in _four_bit(model):
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import (  # noqa: PLC0415 - an optional dependency
                _convert_weight_packed_for_cpu_inverse as unpacked,
            )

            module.weight.data, module.weight.quant_state = unpacked(module.weight.data, state)
            module.quant_state = module.weight.quant_state
        module.support_avx512bf16_for_cpu = False


def _four_bit(model: nn.Module) -> list[Any]:
    library = sys.modules.get("bitsandbytes")  # not imported: then nothing is quantised by it
    kind: Any = () if library is None else library.nn.Linear4bit
    return [module for module in model.modules() if isinstance(module, kind)]
