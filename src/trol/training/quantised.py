"""Quantised weights in training: which parts are, and gradients that pass through them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from trol.errors import HostError
from trol.family.published.quantisation import quantised
from trol.host.quantised import four_bit_maps, keep_differentiable
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


def check_quantised(model: nn.Module) -> None:
    """Raises `HostError` unless exactly the decoder has quantised weights."""
    parts = {part_of(n) for n, p in model.named_parameters() if not p.is_floating_point()}
    if parts != {"decoder"}:
        raise HostError(
            f"{type(model).__name__} was to have a quantised decoder and nothing else quantised, "
            f"but quantised are: {sorted(parts) or 'none'}; train it with bits=0."
        )


def let_gradients_through(model: nn.Module) -> None:
    """Makes 4-bit maps on a CPU differentiable, whatever runs before; call it before training."""
    for four_bit in four_bit_maps(model):
        keep_differentiable(four_bit)
