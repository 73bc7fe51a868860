"""Where a parameter's numbers are, and where those of a layer are computed with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_at_hand(parameter: nn.Parameter | Tensor) -> bool:
    """Whether a parameter lies in this process's memory, whole and unquantised.

    Not on `meta` (offloaded, or not loaded yet), not sharded by FSDP (`DTensor`) or ZeRO-3
    (`ds_id`), and not packed into whole numbers.
    """
    sharded = isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
    return not (sharded or parameter.is_meta) and parameter.is_floating_point()


def running_device(layer: nn.Module) -> torch.device:
    """Where a layer computes: of one that accelerate offloads, where its hooks put the weights.

    `meta` for a layer whose weights have not been read yet.
    """
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # of a SequentialHook, each
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return next(layer.parameters()).device
