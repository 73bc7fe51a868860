"""Rotary position embeddings that depend on a row's length, chosen row by row.

Two kinds of RoPE look at the length n of what they embed: `longrope` (Phi-3's "su") has other
factors beyond the length that the model was first trained for, and `dynamic` (NTK) stretches its
base. transformers takes the longest row of the batch for n, and `dynamic` remembers past calls,
so that a row's result depends on its batch mates. Here n is a row's own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trol.errors import DataError
from trol.host.context import CompileableContextVar

_AT_LEAST = CompileableContextVar("trol_row_lengths")
"""What each row will be long when its prompt is read [B, 1]; None where its positions tell."""

BY_LENGTH = ("longrope", "dynamic")


# transformers fills the buffers of every class whose name has "RotaryEmbedding" in it.
class RowRotaryEmbedding(nn.Module):
    """cos and sin of position · frequency_i, with the frequencies that fit each row's length.

    longrope: 1 / (f_i θ^(2i/d)), f = `short_factor` up to n = `original_max_position_embeddings`
    and `long_factor` beyond. dynamic: θ' = θ (s n / m - (s - 1))^(d / (d - 2)) where n is above
    m = `max_position_embeddings`. Both by the settings in `config.rope_parameters`.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @torch.no_grad()
    def forward(self, state: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, d] in the type of `state`, for positions [B, T]."""
        lengths = position_ids.amax(-1, keepdim=True) + 1  # Shape: [B, 1]
        known = _AT_LEAST.get()
        lengths = lengths if known is None else torch.maximum(lengths, known.to(lengths.device))
        rows = self._stretched(lengths) if self.rope_type == "dynamic" else self._chosen(lengths)
        angles = position_ids[..., None].float() * rows[:, None]
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(state.dtype), sin.to(state.dtype)

    def _chosen(self, lengths: Tensor) -> Tensor:
        """Frequencies [B, d / 2]: long ones for the rows that are longer than the switch."""
        switch = switch_length(self.config)
        assert switch is not None
        longrope = ROPE_INIT_FUNCTIONS["longrope"]
        beyond, _ = longrope(self.config, lengths.device, seq_len=switch + 1)
        return torch.where(lengths > switch, beyond, self.inv_freq.to(lengths.device))

    def _stretched(self, lengths: Tensor) -> Tensor:
        """Frequencies [B, d / 2] of each row's own base."""
        settings, most = self.config.rope_parameters, self.config.max_position_embeddings
        factor, short = settings["factor"], self.inv_freq.to(lengths.device)
        size = 2 * short.shape[0]
        stretch = factor * lengths.clamp(min=most).float() / most - (factor - 1)
        exponent = torch.arange(0, size, 2, device=lengths.device) / (size - 2)
        return short * stretch**-exponent


def by_row(decoder: nn.Module, config: Any) -> None:
    """Gives a decoder whose RoPE depends on the length one that looks at each row by itself."""
    if goes_by_length(config):
        decoder.rotary_emb = RowRotaryEmbedding(config)


@contextmanager
def rows_known(lengths: Tensor) -> Generator[None]:
    """While prompts are read in chunks: each row's whole length, in tokens [B]."""
    token = _AT_LEAST.set(lengths[:, None])
    try:
        yield
    finally:
        _AT_LEAST.reset(token)


def rows_are_known() -> bool:
    """Whether a prompt is being read."""
    return _AT_LEAST.get() is not None


def switch_length(config: Any) -> int | None:
    """The most tokens for which a `longrope` decoder uses its short factors; None for others."""
    settings = getattr(config, "rope_parameters", None) or {}
    if settings.get("rope_type") != "longrope":
        return None
    return settings["original_max_position_embeddings"]


def goes_by_length(config: Any) -> bool:
    """Whether the decoder's RoPE looks at the length of a text, and so has one for any length."""
    settings = getattr(config, "rope_parameters", None) or {}
    return settings.get("rope_type") in BY_LENGTH


def check_length(config: Any, tokens: int) -> None:
    """`DataError` for a prompt of more tokens than the decoder has positions."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokens > most and not goes_by_length(config):
        raise DataError(
            f"the prompt has {tokens} tokens, images included, but the decoder has {most} "
            "positions; shorten the text or give fewer images."
        )
