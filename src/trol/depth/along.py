"""What is kept for each position along with a cache: holes, and what policies remember."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trol.depth.planes import ALONG, adopt
from trol.errors import HostError
from trol.host.position_slot import PositionSlot


def remembered(cache: Any, layer: int, values: Tensor, start: int) -> Tensor:
    """Appends what a policy keeps of each position; gives all. [B, T, ...] -> [B, S, ...].

    Raises:
        HostError: the cache holds tokens that were not remembered.
    """
    kept = getattr(cache, "planes", {}).get((layer, ALONG))
    if kept is not None:
        values = torch.cat([kept.values, values], dim=1)
    if cache is not None:
        if kept is None and start:
            raise HostError(
                f"this cache holds {start} tokens that the policy in force never looked at; start "
                "a new cache with it."
            )
        adopt(cache)
        cache.planes[layer, ALONG] = PositionSlot(values)
    return values
