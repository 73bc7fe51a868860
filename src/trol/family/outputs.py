"""What TroL models return: transformers' outputs, and the image features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class TrolModelOutput(BaseModelOutputWithPast):
    """A decoder's outputs, and the projected image features [N·P, D] where images were given."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TrolCausalLMOutput(CausalLMOutputWithPast):
    """Loss, logits and cache, and the projected image features [N·P, D] if there were images."""

    image_hidden_states: torch.Tensor | None = None
