"""Products that nobody needs, left out of a call of a layer.

Where a layer is left at its cache, its queries; where some tokens attend, the keys behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trol.depth.selection import STRETCH

ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
"""Names that families give to a layer's attention."""

Instead = Callable[..., Any]


class _Instead(TorchFunctionMode):
    """Inside, some functions are called instead of others; only this thread is inside."""

    def __init__(self, instead: Mapping[Callable[..., Any], Instead]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.instead.get(func, func)(*args, **(kwargs or {}))


def query_weight(layer: nn.Module | None) -> Tensor | None:
    """The weight of a layer's query projection, where it is a linear map of its own."""
    found = (getattr(layer, name, None) for name in ATTENTIONS)
    attention = next((module for module in found if module is not None), None)
    projection = getattr(attention, "q_proj", None)
    weight = getattr(getattr(projection, "base_layer", projection), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def without_queries(unasked: Tensor) -> AbstractContextManager[Any]:
    """For a while, zeros are what comes of this weight."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is not unasked:
            return nn.functional.linear(input, weight, bias)
        return input.new_zeros(()).expand(*input.shape[:-1], len(weight))

    return _Instead({nn.functional.linear: linear})


def within_reach(reach: Sequence[int], step: int) -> AbstractContextManager[Any]:
    """For a while, queries attend in stretches, each to the keys up to its last position.

    Exact where the mask hides all later keys: a product with them is one that weighs 0.

    Args:
        reach: of each stretch of queries, as in `Group`.
        step: how many of the keys, the last ones, are of this call.
    """
    plain = nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        if attn_mask is None or not 0 <= len(reach) * STRETCH - query.shape[-2] < STRETCH:
            return plain(query, key, value, attn_mask=attn_mask, **named)
        before, outs = key.shape[-2] - step, []
        masks = attn_mask.split(STRETCH, dim=-2)
        for part, mask, end in zip(query.split(STRETCH, dim=-2), masks, reach, strict=True):
            keys, values = key[..., : before + end, :], value[..., : before + end, :]
            seen = mask[..., : before + end]
            outs.append(plain(part, keys, values, attn_mask=seen, **named))
        return torch.cat(outs, dim=-2)

    return _Instead({plain: attention}) if reach else nullcontext()
