"""Where a parameter's numbers are: whether they can be computed with here and now."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_at_hand(parameter: nn.Parameter | Tensor) -> bool:
    """Whether a parameter lies in this process's memory, whole and unquantised.

    Not on `meta` (offloaded, or not loaded yet), not sharded by FSDP (`DTensor`) or ZeRO-3
    (`ds_id`), and not packed into whole numbers.
    """
    sharded = isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
    return not (sharded or parameter.is_meta) and parameter.is_floating_point()
