"""Reading a state where it stands: the host's final norm and head on the output of any layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trol.depth.families import find_decoder
from trol.errors import HostError

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f", "final_norm")
"""What families call the norm behind their last layer."""

AFTER_NORM = ("project_out",)
"""What some families have between that norm and the head."""


class Readout:
    """logits(x) = head(norm(x)), scaled and capped as the host does behind its last layer.

    Args:
        host: the model that owns the head; its decoder owns the final norm.

    Raises:
        HostError: when it is called on a host that has no head or no norm under a known name.
    """

    def __init__(self, host: Any) -> None:
        self.host = host

    def __call__(self, state: Tensor) -> Tensor:
        """The logits of states that leave the stack here. Shape: [..., D] -> [..., V]."""
        stack: Any = find_decoder(self.host)
        for name in (_norm_name(stack), *AFTER_NORM):
            step = getattr(stack, name, None)
            state = state if step is None else step(state)
        return _finished(self.head(state), stack.config)

    @property
    def head(self) -> nn.Module:
        """The linear map to the vocabulary."""
        head = self.host.get_output_embeddings()
        if head is None:
            raise HostError(
                f"{type(self.host).__name__} has no head, so nothing can be read before the last "
                "layer; attach to the model with its language modelling head."
            )
        return head

    @property
    def flops(self) -> int:
        """FLOPs of reading one token."""
        return 2 * self.head.weight.numel()  # type: ignore[union-attr,operator]


def _norm_name(stack: nn.Module) -> str:
    for name in FINAL_NORMS:
        if hasattr(stack, name):
            return name
    raise HostError(
        f"{type(stack).__name__} has no final norm named {', '.join(FINAL_NORMS)}, so nothing can "
        "be read before its last layer."
    )


def _finished(logits: Tensor, config: Any) -> Tensor:
    for name in ("lm_head_multiplier", "logit_scale"):  # Falcon-H1; Cohere
        factor = getattr(config, name, None)
        logits = logits if factor is None else logits * factor
    divisor = getattr(config, "logits_scaling", None)  # Granite
    logits = logits if divisor is None else logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap
