"""How families read the state behind their last layer: final norm, head, scale and cap.

FLOPs of one visit of a layer, read off its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trol.errors import HostError
from trol.host.layers import LINEAR, MADE_BEFORE_KEYS

FINAL_NORMS = (
    "norm",
    "final_layer_norm",
    "final_layernorm",
    "ln_f",
    "norm_f",
    "final_norm",
    "embedding_norm",  # LFM2
    "layer_norm",  # XGLM, BioGPT
    "layernorm",  # CTRL
)
"""What families call the norm behind their last layer."""

AFTER_NORM = ("project_out",)
"""What some families have between that norm and the head."""

FACTORS = {"lm_head_multiplier": "Falcon-H1", "logit_scale": "Cohere"}
"""Settings by which logits are multiplied, and who has them."""

DIVISOR = "logits_scaling"
"""The setting by which Granite divides its logits."""

MULTIPLIED_BY_DIVISOR = ("hyperclovax",)
"""Families that multiply by it."""

CAPS = {"final_logit_softcapping": "Gemma 2", "logits_soft_cap": "RecurrentGemma"}
"""Settings c of a cap c tanh(logits / c), and who has them."""


def head_of(host: Any) -> nn.Module:
    """The linear map to the vocabulary.

    Raises:
        HostError: there is none.
    """
    head = host.get_output_embeddings()
    if head is None:
        raise HostError(
            f"{type(host).__name__} has no head, so nothing can be read before the last "
            "layer; attach to the model with its language modelling head."
        )
    return head


def readers(host: nn.Module, stack: nn.Module, last: nn.Module) -> tuple[nn.Module, ...]:
    """The last layer, and the modules that are handed its output for all tokens, host left out."""
    name = next(name for name, module in host.named_modules() if module is stack)
    parts = name.split(".") if name else []
    holders = [host.get_submodule(".".join(parts[: n + 1])) for n in range(len(parts))]
    steps = [getattr(stack, one, None) for one in (*FINAL_NORMS, *AFTER_NORM)]
    return (last, *(one for one in (stack, *holders, *steps) if isinstance(one, nn.Module)))


def behind_the_stack(stack: nn.Module, state: Tensor) -> Tensor:
    """What the head reads: the stack's final norm on a state, and what follows. [..., D] -> same.

    Raises:
        HostError: the stack has no norm of a known name.
    """
    norms = [name for name in FINAL_NORMS if hasattr(stack, name)]
    if not norms:
        raise HostError(
            f"{type(stack).__name__} has no final norm named {', '.join(FINAL_NORMS)}, so nothing "
            "can be read before its last layer."
        )
    for name in (norms[0], *AFTER_NORM):
        step = getattr(stack, name, None)  # some of OPT's sizes say that they have none
        state = state if step is None else step(state)
    return state


def finished(logits: Tensor, config: Any) -> Tensor:
    """Logits as the family gives them: multiplied, divided and capped by its settings."""
    for name in FACTORS:
        factor = getattr(config, name, None)
        logits = logits if factor is None else logits * factor
    divisor = getattr(config, DIVISOR, None)
    if divisor is not None:
        multiplies = config.model_type in MULTIPLIED_BY_DIVISOR
        logits = logits * divisor if multiplies else logits / divisor
    for name in CAPS:
        cap = getattr(config, name, None)
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return logits


@dataclass(frozen=True)
class LayerCost:
    """Coefficients of one visit of one layer."""

    per_token: int
    """FLOPs of the linear maps for one token: 2 * number of weights (experts: those chosen)."""
    per_key: int
    """FLOPs of the attention for one token and one key: 4 * heads * head size."""
    per_image_call_token: int
    """FLOPs more for one token of a call that holds image tokens: maps that run only then."""
    window: int | None
    """How many positions a sliding attention sees, or None."""
    keys_per_token: int | None = None
    """FLOPs for one token that leaves its keys and values only; None where that is not known."""

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
    sliding = kind == "sliding_attention" or (kind is None and _always_slides(config))
    window = getattr(config, "sliding_window", None) if sliding else None
    extra = image_flops(layer)
    whole = part_flops(layer, config) - extra
    return LayerCost(whole, 4 * heads * size, extra, window, _keys_flops(layer))


def _keys_flops(layer: nn.Module) -> int | None:
    """FLOPs of the maps that run before keys and values are stored: those of queries as well."""
    found = [
        module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, LINEAR) and MADE_BEFORE_KEYS & set(name.split("."))
    ]
    return 2 * sum(found) or None


def image_flops(layer: nn.Module) -> int:
    """FLOPs for one token of the maps that modules declare, by name, to run on images alone."""
    maps = (
        getattr(module, name)
        for module in layer.modules()
        for name in getattr(module, "runs_on_images", ())
    )
    return 2 * sum(one.weight.numel() for one in maps)


def _always_slides(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None


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
    """Has a layer add to `counts` what it takes in this thread while the counter is on."""
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
        return counted > all_of_it  # experts run in operators of their own, which nobody counts
    return counted not in (maps, all_of_it)  # so does attention, on some devices
