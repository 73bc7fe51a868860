"""Products that nobody needs, left out of a call of a layer.

Where a layer is left at its cache, its queries; where some tokens attend, the keys behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trol.depth.selection import STRETCH
from trol.host.dispatch import without_subclasses

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


def without_queries(unasked: Tensor) -> AbstractContextManager[Any]:
    """For a while, zeros are what comes of this weight."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is not unasked:
            return nn.functional.linear(input, weight, bias)
        return input.new_zeros(()).expand(*input.shape[:-1], len(weight))

    return _Instead({nn.functional.linear: linear})


class ReachMask(Tensor):
    """A mask whose queries attend in stretches, each to the keys up to its last position.

    Exact where the mask hides all later keys: a product with them is one that weighs 0. It is a
    tensor like any other but for sdpa, and costs other functions nothing, since they never see it.
    """

    reach: tuple[int, ...]
    """Of each stretch of queries, as in `Group`."""
    step: int
    """How many of the keys, the last ones, are of this call."""

    @classmethod
    def of(cls, mask: Tensor, reach: Sequence[int], step: int) -> ReachMask:
        """The same mask [b, 1, m, S]."""
        made = mask.as_subclass(cls)
        made.reach, made.step = tuple(reach), step
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            with without_subclasses():
                return _in_stretches(*args, **(kwargs or {}))
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, ReachMask) and isinstance(args[0], ReachMask):
            out.reach, out.step = args[0].reach, args[0].step  # a part of it, say
        return out


def _in_stretches(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: ReachMask, **named: Any
) -> Tensor:
    plain, outs = nn.functional.scaled_dot_product_attention, []
    before, reach = key.shape[-2] - attn_mask.step, attn_mask.reach
    mask = attn_mask.as_subclass(Tensor)
    parts = zip(query.split(STRETCH, dim=-2), mask.split(STRETCH, dim=-2), reach, strict=True)
    for part, seen, end in parts:
        keys, values = key[..., : before + end, :], value[..., : before + end, :]
        outs.append(plain(part, keys, values, attn_mask=seen[..., : before + end], **named))
    return torch.cat(outs, dim=-2)
