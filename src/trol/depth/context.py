"""What a policy may know of one call beyond the state it is asked about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trol.depth.readout import Readout
from trol.depth.roles import Mask
from trol.errors import HostError

INPUT = "input"
"""Under this note, for policies that read it, lies what entered layer 0. Shape: [B, T, D]."""


@dataclass(frozen=True)
class Context:
    """The B x T tokens of one call: who is in scope, where they stand, how they would be read."""

    in_scope: Mask = True
    """Where the policy applies. Shape: [B, T]."""
    start: int = 0
    """Columns before these tokens, if the policy reads it (`reads_start`), else 0."""
    padding: Tensor | None = None
    """The padding mask as the caller gave it: 1 at tokens that are none. Shape: [B, S]."""
    readout: Readout | None = None
    """The host's final norm and head; None where the stack is called without its host."""
    training: bool = False
    """Whether the stack is in training mode."""
    layers: int = 0
    """How many layers the stack has."""
    fuses: bool = False
    """Whether kernels of ours may run in the place of operators."""
    notes: dict[Any, Any] = field(default_factory=dict)
    """What the policy itself writes down for its later layers. Key a note by its layer: a layer
    runs again in the backward pass of gradient checkpointing, and must find what it found."""

    def real(self, state: Tensor) -> Tensor:
        """Which of these tokens are no padding. Shape: [B, T, D] -> BoolTensor [B, T]."""
        rows, tokens = state.shape[:2]
        if self.padding is None:
            return torch.ones(rows, tokens, dtype=torch.bool, device=state.device)
        return self.padding[:, -tokens:].bool().to(state.device)

    def positions(self, state: Tensor) -> Tensor:
        """How many tokens of its row came before each, padding not counted: [B, T, D] -> [B, T]."""
        tokens = state.shape[1]
        if self.padding is None:
            return torch.arange(self.start, self.start + tokens, device=state.device)[None]
        counted = self.padding.long().cumsum(-1) - 1
        return counted.clamp(min=0)[:, -tokens:].to(state.device)

    def scope(self, state: Tensor) -> Tensor:
        """The real tokens in scope. Shape: [B, T, D] -> BoolTensor [B, T]."""
        return self.real(state) & self.in_scope

    def read(self, state: Tensor) -> Tensor:
        """The logits that these states would give if they left now. Shape: [B, T, D] -> [B, T, V].

        Raises:
            HostError: the stack runs without the model that owns the head.
        """
        if self.readout is None:
            raise HostError(
                "this policy reads predictions between layers, but the decoder is called without "
                "its head; call the model that it belongs to."
            )
        return self.readout(state)
