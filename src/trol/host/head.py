"""How families read the state behind their last layer: final norm, head, scale and cap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trol.errors import HostError

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
