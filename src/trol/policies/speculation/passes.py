"""Passes of a model inside a decoding loop, prepared as transformers prepares its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy
from trol.depth.call import ambience_of, in_force
from trol.depth.planes import PlanedCache, forked
from trol.host.cache import record_past
from trol.host.generation import SLICES_LOGITS, grown, next_pass, prefill, with_cache
from trol.host.names import CACHE


class Passes:
    """One model in one `generate` call: its keyword arguments, as long as its tokens are.

    Args:
        model: the host.
        kwargs: what `generate` hands to its decoding loop beside the ids, the cache included.
    """

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.kwargs = model, kwargs
        self.outputs: Any = None

    @property
    def cache(self) -> Any:
        return self.kwargs.get(CACHE)

    def prompt(self, ids: Tensor, config: Any) -> Tensor:
        """The pass over the prompt. Gives the last token's logits. Shape: [B, 1, V]."""
        self.outputs = prefill(self.model, ids, config, self.kwargs)
        return self._logits(1)

    def over(self, ids: Tensor, new: int, *, read: int | None = None) -> Tensor:
        """A pass over the last `new` of the ids [B, n]; `over` and `grow` keep n in step.

        Gives the logits of the last `read` (default: `new`) of them. Shape: [B, read, V].
        """
        read = new if read is None else read
        inputs = next_pass(self.model, ids, new, self.kwargs)
        if SLICES_LOGITS in inputs:
            inputs[SLICES_LOGITS] = read
        self.outputs = self.model(**inputs, return_dict=True)
        return self._logits(read)

    def grow(self, tokens: int) -> None:
        """Tells masks and positions that there are `tokens` more ids."""
        if tokens:
            self.kwargs = grown(self.model, self.outputs, self.kwargs, tokens)

    def fork(self, *, planes: bool) -> Passes:
        """The same passes on a cache of their own, which starts from what this one holds."""
        twin = Passes(self.model, dict(self.kwargs))
        cache = twin.kwargs[CACHE] = forked(self.cache, planes=planes)
        recording(cache, on=False)  # nothing is cut off a fork
        twin.outputs = with_cache(self.outputs, twin.cache)
        return twin

    def _logits(self, read: int) -> Tensor:
        logits = self.outputs.logits[:, -read:].to(torch.float32, copy=True)
        self.outputs.logits = logits  # not all those of a long prompt
        return logits


def recording(cache: Any, *, on: bool) -> None:
    """Has sliding windows keep what a crop may need again, or no longer."""
    planes = cache.planes.values() if isinstance(cache, PlanedCache) else ()
    record_past(cache, (*cache.layers, *planes), on=on)


@contextmanager
def under(stack: Any, policy: AbstractPolicy) -> Generator[None]:
    """Puts `policy` in force inside a block of `trol.depth.host.decoding`, without its checks."""
    assert stack.depth_ambiences  # or the stack would not look
    with in_force(stack, replace(ambience_of(stack), policy=policy)):
        yield


def reads_planes(policy: AbstractPolicy, layers: int) -> bool:
    """Whether a policy looks at more of a cache than its first keys and values."""
    deep = any(policy.bounds(layer).most > 1 for layer in range(layers))
    return deep or policy.reads_start or policy.observes or policy.skipped_kv == "hole"
