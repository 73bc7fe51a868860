"""The door for those who compile a model themselves, with a cache of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from trol.depth.generation import make_ready
from trol.depth.host import attached
from trol.depth.planes import check_cache


def prepare_cache(model: nn.Module, cache: Any) -> Any:
    """Gives a cache, in place, all that the attached policy will keep in it; returns it.

    Code under `torch.compile` can change neither a cache's class nor what it is made of. Call this
    before the compiled model sees the cache; `generate` does it by itself. After
    `cache.early_initialization(...)`, planes above 1 are initialised like plane 1.

    Raises:
        UsageError: no policy is attached.
        HostError: this is no transformers cache, or its layers hold rows of different lengths.
    """
    _, stack = attached(model)
    check_cache(cache)
    make_ready(stack, cache, planes=True)
    return cache
