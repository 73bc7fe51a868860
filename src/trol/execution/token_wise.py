"""Token-wise execution: a layer runs on all tokens, but its parts compute the visiting ones alone.

What a token-wise part of a layer (`trol.host.names.TOKEN_WISE`) makes of a token, only that token
reads. So norms, keys, values, attention and cache stay as the host wrote them, for all tokens; the
parts compute the tokens that make the visit, and give the others 0. That 0 is never read: the
other tokens' state is put back behind the layer, and their keys and values were computed before.

On a CPU, attention computes the queries of the visiting tokens alone as well:

    sdpa(q, k, v, mask)[places]  ==  sdpa(q[places], k, v, mask[places])

On a GPU a call of sdpa is one launch of a kernel that needs no mask; there all queries attend.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from trol.axes import States, TokenMask
from trol.host.torch_internals import CompileableContextVar

_VISITING = CompileableContextVar("trol_visiting_tokens")


def of_visiting_tokens(values: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, "_ n *rest"]:
    """What of `values` [B, T, ...] belongs to the tokens that the running part computes.

    For parts that read something of each token beside their arguments. Shape: [1, n, ...].
    """
    visiting: VisitingTokens | None = _VISITING.get()
    return values if visiting is None else visiting.select(values)


class VisitingTokens:
    """Which of a call's B * T tokens make one visit of a layer, where not all of them do."""

    def __init__(self, rows: int, tokens: int, places: Integer[Tensor, " n"]) -> None:
        self.shape = rows, tokens
        self.count = len(places)
        self.places = places if self.count else places.new_zeros(1)
        """Their indices among the B * T tokens; if there are none, the first token. Shape: [n]."""

    @classmethod
    def from_mask(cls, mask: TokenMask) -> "VisitingTokens":
        """Those of a BoolTensor [B, T]: the one look at a device's values that a visit takes."""
        rows, tokens = mask.shape
        return cls(rows, tokens, mask.flatten().nonzero()[:, 0])

    @classmethod
    def from_rows(cls, visits: Sequence[bool], state: States) -> "VisitingTokens":
        """All tokens of some rows; `visits` says of each row whether it is one. State [B, T, D]."""
        tokens = state.shape[1]
        rows = torch.tensor([row for row, visit in enumerate(visits) if visit])
        places = (rows[:, None] * tokens + torch.arange(tokens)).flatten()
        return cls(len(visits), tokens, places.to(state.device))

    @classmethod
    def last_of_rows(cls, state: States) -> "VisitingTokens":
        """The last token of each row. Shape of state: [B, T, D]."""
        rows, tokens = state.shape[:2]
        return cls(rows, tokens, torch.arange(tokens - 1, rows * tokens, tokens).to(state.device))

    @property
    def staying(self) -> int:
        """How many tokens do not make the visit."""
        return self.shape[0] * self.shape[1] - self.count

    def select(self, value: Any) -> Any:
        """The visiting tokens' part of a tensor [B, T, ...] or [B * T, ...]; other values as is.

        Shape: [1, n, ...] or [n, ...].
        """
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] == self.shape:
            return value.flatten(0, 1).index_select(0, self.places)[None]
        if value.ndim and len(value) == self.shape[0] * self.shape[1]:
            return value.index_select(0, self.places)
        return value

    def scatter(
        self, value: Float[Tensor, "*leading out"], like: Float[Tensor, "*axes in"]
    ) -> Float[Tensor, "*axes out"]:
        """`value` at the visiting tokens' places, 0 at all others; leading axes are `like`'s."""
        size, width = self.shape[0] * self.shape[1], value.shape[-1]
        whole = value.new_zeros(size, width)
        whole.index_copy_(0, self.places, value.flatten(0, -2))
        return whole.view(*like.shape[:-1], width)

    def stand_in(self, part: nn.Module) -> "VisitingPart":
        """What takes the place of a token-wise part during the visit."""
        return VisitingPart(part, self)


class VisitingPart:
    """A token-wise part of a layer that computes the visiting tokens alone."""

    def __init__(self, part: nn.Module, visiting: VisitingTokens) -> None:
        self.part, self.visiting = part, visiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The part's output; 0 for tokens that stay. Shape: [B, T, ...]."""
        select = self.visiting.select
        selected = select(state)
        if selected is state:
            return self.part(state, *args, **kwargs)
        token = _VISITING.set(self.visiting)
        try:
            own = {name: select(value) for name, value in kwargs.items()}
            out = self.part(selected, *(select(value) for value in args), **own)
        finally:
            _VISITING.reset(token)
        if isinstance(out, tuple):  # further outputs are router logits; if shown, all are computed
            return self.visiting.scatter(out[0], state), *out[1:]
        return self.visiting.scatter(out, state)


STRETCH = 64
"""Queries that attend in one call: under a causal mask, later ones see more keys than earlier."""


class VisitingQueries(TorchFunctionMode):
    """Inside, in this thread, sdpa computes the visiting tokens' queries alone; others are 0."""

    def __init__(self, visiting: VisitingTokens) -> None:
        super().__init__()
        rows, tokens = visiting.shape
        counts = (visiting.places // tokens).bincount(minlength=rows).tolist()
        self.shape = visiting.shape
        self.places = [own % tokens for own in visiting.places.split(counts)]
        self.skipped_pairs = 0
        """Pairs of a query and a key that were not computed."""

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
        query: Float[Tensor, "B H T d"],
        key: Float[Tensor, "B H_kv S d"],
        value: Float[Tensor, "B H_kv S d_v"],
        attn_mask: Shaped[Tensor, "*B_H T S"] | None = None,
        *,
        is_causal: bool = False,
        **settings: Any,
    ) -> Float[Tensor, "B H T d_v"]:
        out = value.new_zeros(*query.shape[:-1], value.shape[-1])
        self.skipped_pairs += query.shape[0] * query.shape[2] * key.shape[-2]
        for row, places in enumerate(self.places):
            one, results = slice(row, row + 1), []
            for part in places.split(STRETCH) if len(places) else ():
                mask, columns = None, slice(None)
                if is_causal:
                    mask = torch.arange(int(part[-1]) + 1) <= part[:, None]
                    columns = slice(mask.shape[-1])
                elif attn_mask is not None:
                    mask = attn_mask[one if len(attn_mask) > 1 else slice(1)].index_select(-2, part)
                    columns = _seen_columns(mask)
                    mask = mask[..., columns]
                keys, values = key[one][:, :, columns], value[one][:, :, columns]
                queries = query[one].index_select(2, part)
                results.append(
                    scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **settings)
                )
                self.skipped_pairs -= len(part) * keys.shape[-2]
            if results:
                out[row].index_copy_(1, places, torch.cat(results, dim=2)[0])
        return out


def _seen_columns(mask: Tensor) -> Any:
    """Keys that some query sees; all where there is none, so that the output is as before."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    columns = seen.flatten(0, -2).any(0).nonzero()[:, 0]
    return columns if 0 < len(columns) < mask.shape[-1] else slice(None)
