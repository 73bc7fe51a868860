"""FLOPs of one visit of a layer: predicted from its modules, and counted by torch."""

from dataclasses import dataclass
from threading import get_ident
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trol.host.layers import LINEAR
from trol.host.names import COMPUTED_BEFORE_KEYS

COUNTED = ("eager", "sdpa")
"""Attentions made of operators whose FLOPs torch counts, as far as it counts any."""


@dataclass(frozen=True)
class LayerCost:
    """Coefficients of one visit of one layer."""

    per_token: int
    """FLOPs of the linear maps for one token: 2 * number of weights (experts: those chosen)."""
    per_key: int
    """FLOPs of the attention for one token and one key: 4 * heads * head size."""
    per_image_call_token: int
    """Further FLOPs for one token of a call that holds image tokens: maps that run only then."""
    window: int | None
    """How many positions a sliding attention sees, or None."""
    keys_per_token: int | None = None
    """FLOPs of the maps that run before one token's keys and values are stored; None if unknown."""

    def flops(self, count: int, *, step: int, past: int = 0, images: bool = False) -> int:
        """FLOPs of one visit of `count` tokens, each beside `step` of its row, after `past`."""
        seen = past if self.window is None else min(past, self.window - 1)
        extra = self.per_image_call_token * images
        return count * (self.per_token + self.per_key * (seen + step) + extra)


def matrix_flops(module: nn.Module) -> int:
    """FLOPs of a module's matrices on one token: 2 * number of weights."""
    return 2 * sum(p.numel() for p in module.parameters() if p.ndim == 2)


def layer_cost(layer: nn.Module, config: Any, kind: str | None) -> LayerCost | None:
    """The coefficients of a layer of this kind (`layer_types`); None where they are not known."""
    if any(isinstance(module, nn.Conv1d) for module in layer.modules()):
        return None
    heads = config.num_attention_heads
    attention = next((one for one in layer.modules() if hasattr(one, "is_causal")), layer)
    size = getattr(attention, "head_dim", None)  # of some families it differs from layer to layer
    size = size or getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    if kind not in (None, "sliding_attention"):
        window = None
    images = image_flops(layer)
    per_token = part_flops(layer, config) - images
    return LayerCost(per_token, 4 * heads * size, images, window, _keys_flops(layer))


def _keys_flops(layer: nn.Module) -> int | None:
    """FLOPs of the maps that run before keys and values are stored: those of queries as well."""
    sizes = [
        module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, LINEAR) and COMPUTED_BEFORE_KEYS & set(name.split("."))
    ]
    return 2 * sum(sizes) or None


def image_flops(layer: nn.Module) -> int:
    """FLOPs for one token of the maps that modules declare, by name, to run on images alone."""
    maps = (
        getattr(module, name)
        for module in layer.modules()
        for name in getattr(module, "runs_on_images", ())
    )
    return 2 * sum(one.weight.numel() for one in maps)


def part_flops(layer: nn.Module, config: Any) -> int:
    """FLOPs of the linear maps of a layer, or of a part of one, for one token."""
    linear = sum(
        module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, LINEAR) and name != "depth"
    )
    experts = [p for p in layer.parameters() if p.ndim == 3]
    routers = [
        p
        for name, p in layer.named_parameters()
        if p.ndim == 2 and experts and name.endswith(("gate.weight", "router.weight"))
    ]
    owned = {id(m.weight) for m in layer.modules() if isinstance(m, LINEAR)}
    linear += sum(p.numel() for p in routers if id(p) not in owned)
    chosen = getattr(config, "num_experts_per_tok", 1)
    return 2 * (linear + sum(p.numel() * chosen // p.shape[0] for p in experts))


def count_flops(layer: nn.Module, index: int, counts: dict[int, int], by: FlopCounterMode) -> None:
    """Adds hooks to a layer that sum its FLOPs in this thread, as `by` counts them, in `counts`."""
    mine = get_ident()

    def begin(*_: Any) -> None:
        counts[index] -= by.get_total_flops() if get_ident() == mine else 0

    def end(*_: Any) -> None:
        counts[index] += by.get_total_flops() if get_ident() == mine else 0

    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(end)


def miscounted(layer: nn.Module, cost: LayerCost | None, counted: int, tokens: int) -> bool:
    """Whether one visit took other FLOPs than predicted, as far as torch counts them."""
    if cost is None:
        return False
    maps, all_of_it = tokens * cost.per_token, cost.flops(tokens, step=tokens)
    if any(parameter.ndim == 3 for parameter in layer.parameters()):
        return counted > all_of_it  # torch does not count the operators of experts
    return counted not in (maps, all_of_it)  # so does attention, on some devices
