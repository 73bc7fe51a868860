"""Attention of the tokens that go, where products are dear: sdpa is asked for their queries alone.

    sdpa(q, k, v, mask)[places]  ==  sdpa(q[places], k, v, mask[places])

On a GPU a call of sdpa is one launch of a kernel that needs no mask; there all queries attend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from trol.host.token_wise import Going

STRETCH = 64
"""Queries that attend together: under a causal mask, later ones see more keys than earlier ones."""


class Attending(TorchFunctionMode):
    """Inside, in this thread, sdpa computes the queries of the tokens that go; others are 0."""

    def __init__(self, going: Going) -> None:
        super().__init__()
        rows, tokens = going.shape
        counts = (going.places // tokens).bincount(minlength=rows).tolist()
        self.shape = going.shape
        self.places = [own % tokens for own in going.places.split(counts)]
        self.spared = 0
        """Pairs of a query and a key that were left out."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is scaled_dot_product_attention and args and args[0].shape[::2][:2] == self.shape:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        **named: Any,
    ) -> Tensor:
        out = value.new_zeros(*query.shape[:-1], value.shape[-1])
        self.spared += query.shape[0] * query.shape[2] * key.shape[-2]
        for row, places in enumerate(self.places):
            one, mine = slice(row, row + 1), []
            for part in places.split(STRETCH) if len(places) else ():
                if is_causal:
                    mask = torch.arange(int(part[-1]) + 1) <= part[:, None]
                    seen: Tensor | slice = slice(mask.shape[-1])
                elif attn_mask is not None:
                    mask = attn_mask[one if len(attn_mask) > 1 else slice(1)].index_select(-2, part)
                    seen = _seen(mask)
                    mask = mask[..., seen]
                else:
                    mask, seen = None, slice(None)
                asked, keys, values = query[one].index_select(2, part), key[one], value[one]
                keys, values = keys[:, :, seen], values[:, :, seen]
                mine.append(
                    scaled_dot_product_attention(asked, keys, values, attn_mask=mask, **named)
                )
                self.spared -= len(part) * keys.shape[-2]
            if mine:
                out[row].index_copy_(1, places, torch.cat(mine, dim=2)[0])
        return out


def _seen(mask: Tensor) -> Tensor | slice:
    """Keys that some query sees; all where there is none, so that what comes of it is as before."""
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    columns = shown.flatten(0, -2).any(0).nonzero()[:, 0]
    return columns if 0 < len(columns) < mask.shape[-1] else slice(None)
