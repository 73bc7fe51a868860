"""Weights: whether they are quantised, whether they are in memory, and where a layer computes."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trol.errors import HostError
from trol.host.sharding import PIECE

PACKED_FLAG = "packing_format_for_cpu"
"""Attribute of bitsandbytes' quantisation state: the map's weight is packed for a CPU."""

PACKS_FLAG = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' 4-bit map: it will pack its weight in the next evaluation."""

PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)
"""Types in which buffers of two and more dimensions are packed weights (GPTQ's, AWQ's)."""


def is_quantised(model: nn.Module) -> bool:
    """Whether some weight is kept in whole numbers, or in fewer than 16 bits.

    The weights say so, not the configuration: one that came from a GGUF file, or was dequantised,
    may have full weights beside a configuration that says quantised.
    """
    weights = any(not p.is_floating_point() or p.itemsize < 2 for p in model.parameters())
    return weights or any(b.dtype in PACKED and b.ndim > 1 for b in model.buffers())


def forget_quantisation(model: Any) -> None:
    """Removes from a model with full weights, in place, all that says that they are quantised."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    elif getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config


def four_bit_maps(model: nn.Module) -> list[Any]:
    """The linear maps of a model that bitsandbytes keeps in 4 bits."""
    library = sys.modules.get("bitsandbytes")  # not imported: then nothing is quantised by it
    kind: Any = () if library is None else library.nn.Linear4bit
    return [module for module in model.modules() if isinstance(module, kind)]


def keep_differentiable(four_bit: Any) -> None:
    """Makes a 4-bit map on a CPU differentiable, whatever ran before, and keeps it so.

    bitsandbytes (0.50) repacks a 4-bit weight in the first evaluation on a CPU with AVX512-BF16,
    and from then on multiplies by a kernel without a gradient: all layers below would stop
    learning, with no more than a warning. Here a packed weight is unpacked, and stays so.

    Raises:
        HostError: this bitsandbytes has other names for whether a weight is packed.
    """
    state = four_bit.weight.quant_state
    if not hasattr(four_bit, PACKS_FLAG):
        raise HostError(
            "this bitsandbytes does not say whether it packs 4-bit weights for a CPU "
            f"({PACKS_FLAG}), through which no gradient would pass; train with bits=0."
        )
    if getattr(state, PACKED_FLAG, False):  # only a packed state has the attribute
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked  # noqa: PLC0415 - an optional dependency

        four_bit.weight.data, four_bit.weight.quant_state = unpacked(four_bit.weight.data, state)
        four_bit.quant_state = four_bit.weight.quant_state
    setattr(four_bit, PACKS_FLAG, False)


def is_at_hand(parameter: nn.Parameter | Tensor) -> bool:
    """Whether a parameter lies in this process's memory, whole and unquantised.

    Not on `meta` (offloaded, or not loaded yet), not sharded by FSDP (`DTensor`) or ZeRO-3
    (`PIECE`), and not packed into whole numbers.
    """
    sharded = isinstance(parameter, DTensor) or hasattr(parameter, PIECE)
    return not (sharded or parameter.is_meta) and parameter.is_floating_point()


def running_device(layer: nn.Module) -> torch.device:
    """Where a layer computes; if accelerate offloads it, the device its hooks move weights to.

    `meta` for a layer whose weights have not been read yet.
    """
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # of a SequentialHook, each
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return next(layer.parameters()).device
