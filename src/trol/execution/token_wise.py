"""Token-wise execution: a layer is entered with all tokens, and parts of it compute those that go.

What a layer's token-wise parts (`trol.host.names`) make of a token is read by that token alone. So
norms, keys, values, attention and cache stay as the host wrote them, for all tokens; the parts take
the tokens that go and put theirs in place. What the others get there is never read: their state is
put back behind the layer, and their keys and values were made before.

Attention of the tokens that go, where products are dear: sdpa is asked for their queries alone.

    sdpa(q, k, v, mask)[places]  ==  sdpa(q[places], k, v, mask[places])

On a GPU a call of sdpa is one launch of a kernel that needs no mask; there all queries attend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from trol.host.runtime import CompileableContextVar

_COMPUTED = CompileableContextVar("trol_computed_tokens")


def of_visiting_tokens(values: Tensor) -> Tensor:
    """What of `values` [B, T, ...] belongs to the tokens that the running part computes.

    For parts that read something of each token past their arguments. Shape: [1, n, ...].
    """
    going: VisitingTokens | None = _COMPUTED.get()
    return values if going is None else going.taken(values)


class VisitingTokens:
    """The tokens of a call that make one visit, where not all of them do."""

    def __init__(self, rows: int, tokens: int, places: Tensor) -> None:
        self.shape = rows, tokens
        self.count = len(places)
        self.places = places if self.count else places.new_zeros(1)
        """Where they lie among the B * T tokens; the first, where nobody goes. Shape: [n]."""

    @classmethod
    def of(cls, need: Tensor) -> VisitingTokens:
        """Those of a BoolTensor [B, T]: the one look at a device's values that a visit takes."""
        rows, tokens = need.shape
        return cls(rows, tokens, need.flatten().nonzero()[:, 0])

    @classmethod
    def of_rows(cls, going: Sequence[bool], state: Tensor) -> VisitingTokens:
        """All tokens of the rows that go. Shape of state: [B, T, D]."""
        tokens = state.shape[1]
        rows = torch.tensor([row for row, goes in enumerate(going) if goes])
        places = (rows[:, None] * tokens + torch.arange(tokens)).flatten()
        return cls(len(going), tokens, places.to(state.device))

    @classmethod
    def last(cls, state: Tensor) -> VisitingTokens:
        """The last token of each row. Shape of state: [B, T, D]."""
        rows, tokens = state.shape[:2]
        return cls(rows, tokens, torch.arange(tokens - 1, rows * tokens, tokens).to(state.device))

    @property
    def staying(self) -> int:
        """How many tokens do not go."""
        return self.shape[0] * self.shape[1] - self.count

    def taken(self, value: Any) -> Any:
        """Their part of [B, T, ...] or [B * T, ...]; anything else as it is.

        Shape: [1, n, ...] or [n, ...].
        """
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] == self.shape:
            return value.flatten(0, 1).index_select(0, self.places)[None]
        if value.ndim and len(value) == self.shape[0] * self.shape[1]:
            return value.index_select(0, self.places)
        return value

    def put(self, value: Tensor, given: Tensor) -> Tensor:
        """`value` in their places, 0 in all others; in front shaped like `given`."""
        size, width = self.shape[0] * self.shape[1], value.shape[-1]
        whole = value.new_zeros(size, width)
        whole.index_copy_(0, self.places, value.flatten(0, -2))
        return whole.view(*given.shape[:-1], width)

    def computing(self, part: nn.Module) -> VisitingPart:
        """What stands in the place of a token-wise part during the visit."""
        return VisitingPart(part, self)


class VisitingPart:
    """A token-wise part of a layer that computes the tokens that go."""

    def __init__(self, part: nn.Module, going: VisitingTokens) -> None:
        self.part, self.going = part, going

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The part's output, of tokens that stay something finite. Shape: [B, T, ...]."""
        going = self.going
        taken = going.taken(given)
        if taken is given:
            return self.part(given, *args, **kwargs)
        token = _COMPUTED.set(going)
        try:
            out = self.part(
                taken,
                *(going.taken(value) for value in args),
                **{name: going.taken(value) for name, value in kwargs.items()},
            )
        finally:
            _COMPUTED.reset(token)
        if isinstance(out, tuple):  # what comes beside it is shown to nobody, or all are computed
            return going.put(out[0], given), *out[1:]
        return going.put(out, given)


STRETCH = 64
"""Queries that attend together: under a causal mask, later ones see more keys than earlier ones."""


class VisitingQueries(TorchFunctionMode):
    """Inside, in this thread, sdpa computes the queries of the tokens that go; others are 0."""

    def __init__(self, going: VisitingTokens) -> None:
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
