"""What transformers collects of modules inside layers, such as attentions, brought into order.

It has a hook on each module whose outputs can be asked for, and collects what each run of it
gives: nothing of a layer that is skipped, and more of one that is visited again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from trol.host.dispatch import CAPTURING


def by_layer(
    values: Sequence[Any], layers: Sequence[nn.Module], runs: Sequence[int | None], key: str
) -> tuple[Any, ...]:
    """Those of first runs, and None for a layer that was skipped: an index keeps its meaning.

    Args:
        values: what was collected, in order.
        layers: the layers that hold the modules.
        runs: how often each ran; None for one that the host did not call.
        key: under which name it was collected.
    """
    each = [
        0 if count is None else _collecting(layer, key)
        for layer, count in zip(layers, runs, strict=True)
    ]
    if len(values) != sum(one * (count or 0) for one, count in zip(each, runs, strict=True)):
        return tuple(values)  # the family gathers them in a way of its own
    kept: list[Any] = []
    rest = list(values)
    for one, count in zip(each, runs, strict=True):
        kept += rest[:one] if count else [None] * one
        del rest[: one * (count or 0)]
    return tuple(kept)


def _collecting(layer: nn.Module, key: str) -> int:
    """How many modules of a layer are watched under this name."""
    hooks = (hook for module in layer.modules() for hook in module._forward_hooks.values())
    return sum(getattr(h, "__module__", None) == CAPTURING and _key(h) == key for h in hooks)


def _key(hook: Any) -> Any:
    return inspect.getclosurevars(hook).nonlocals.get("key")
