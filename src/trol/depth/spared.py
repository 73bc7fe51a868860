"""Queries that nobody asks with: where a layer is left at its cache, they need not be computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
"""Names that families give to a layer's attention."""


class _WithoutProduct(TorchFunctionMode):
    """Inside, the product with one weight is zeros; only this thread is inside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and len(args) > 1 and args[1] is self.weight:
            return args[0].new_zeros(()).expand(*args[0].shape[:-1], len(self.weight))
        return func(*args, **(kwargs or {}))


def query_weight(layer: nn.Module | None) -> Tensor | None:
    """The weight of a layer's query projection, where it is a linear map of its own."""
    found = (getattr(layer, name, None) for name in ATTENTIONS)
    attention = next((module for module in found if module is not None), None)
    projection = getattr(attention, "q_proj", None)
    weight = getattr(getattr(projection, "base_layer", projection), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def without_queries(weight: Tensor | None) -> AbstractContextManager[Any]:
    """Leaves the product with this weight out, for a while."""
    return nullcontext() if weight is None else _WithoutProduct(weight)
