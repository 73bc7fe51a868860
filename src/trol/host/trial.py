"""Trying somebody's model on a few ids, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trol.host.cache import new_cache
from trol.host.classes import original_class
from trol.host.names import CACHE
from trol.host.runtime import without_hooks
from trol.host.weights import is_at_hand

VOCABULARY = 64
"""Ids are drawn below this: low ones are text in every tokenizer, but for those named apart."""


def kinds_of(layers: list[nn.Module], config: Any) -> list[tuple[Any, ...]]:
    """What tells layers apart: their class, their parts', and their place in a cache."""
    places = new_cache(config).layers
    types: Any = getattr(config, "layer_types", None) or [None] * len(layers)
    return [
        (
            original_class(layer),
            tuple(type(part) for part in layer.modules() if part is not layer),
            type(places[index]) if index < len(places) else None,
            types[index],
        )
        for index, layer in enumerate(layers)
    ]


def can_run(host: nn.Module, config: Any, tokens: int) -> bool:
    """Whether so many ids can be passed through a model of this stack here and now."""
    positions = getattr(config, "max_position_embeddings", None) or tokens
    return positions >= tokens and all(is_at_hand(one) for one in host.parameters())


def last_on_cache(stack: Any, ids: Tensor) -> Tensor:
    """What leaves a stack for the last id, on a cache of all others. Shape: [1, D]."""
    cache = {CACHE: new_cache(stack.config), "use_cache": True}
    stack(ids[:, :-1], **cache)
    return stack(ids[:, -1:], **cache)[0][:, -1]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number; 0 where both are nan."""
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()


def allowed(logits: Tensor) -> float:
    """Above rounding, which is some eps, and below what a wrong mask or state does."""
    return 4 * torch.finfo(logits.dtype).eps ** (2 / 3)


def harmless_ids(config: Any, count: int, device: torch.device) -> Tensor:
    """Random ids that name no picture, sound or end. Shape: [1, count]."""
    apart = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    size = min(VOCABULARY, config.get_text_config().vocab_size)
    known = torch.tensor([one for one in range(size) if one not in apart])
    source = torch.Generator().manual_seed(0)
    return known[torch.randint(len(known), (1, count), generator=source)].to(device)


@contextmanager
def at_rest(host: nn.Module, layers: list[nn.Module]) -> Generator[None]:
    """For a while: evaluation mode, no draws from the caller's random state, nobody's hooks."""
    training = [module for module in host.modules() if module.training]
    inside = {part for layer in layers for part in layer.modules()}
    devices = sorted({p.device.index or 0 for p in layers[0].parameters() if p.is_cuda})
    # Some models note what they read last on themselves, above the stack.
    noted = [(module, dict(vars(module))) for module in host.modules() if module not in inside]
    host.eval()
    try:
        with torch.random.fork_rng(devices=devices), without_hooks(host.modules()):
            yield
    finally:
        for module, values in noted:
            vars(module).clear()
            vars(module).update(values)
        for module in training:
            module.training = True
