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
        if func is scaled_dot_product_attention and args[0].shape[::2][:2] == self.shape:
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
        seen = torch.arange(key.shape[-2], device=key.device)
        self.spared += query.shape[0] * query.shape[2] * len(seen)
        for row, places in enumerate(self.places):
            one, mine = slice(row, row + 1), []
            for part in places.split(STRETCH) if len(places) else ():
                end = int(part[-1]) + 1 if is_causal else len(seen)
                mask = seen[:end] <= part[:, None] if is_causal else None
                if attn_mask is not None:
                    mask = attn_mask[one if len(attn_mask) > 1 else slice(1)].index_select(-2, part)
                asked, keys, values = query[one].index_select(2, part), key[one], value[one]
                mine.append(
                    scaled_dot_product_attention(
                        asked, keys[:, :, :end], values[:, :, :end], attn_mask=mask, **named
                    )
                )
                self.spared -= len(part) * end
            if mine:
                out[row].index_copy_(1, places, torch.cat(mine, dim=2)[0])
        return out
