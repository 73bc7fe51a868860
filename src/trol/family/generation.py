"""Generation with images, and rotary position embeddings chosen by the length of each row.

Two kinds of RoPE look at the length n of what they embed: `longrope` (Phi-3's "su") has other
factors beyond the length that the model was first trained for, and `dynamic` (NTK) stretches its
base. transformers takes the longest row of the batch for n, and `dynamic` remembers past calls,
so a row's result depends on its batch mates. Here n is a row's own.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trol.errors import DataError
from trol.family.configuration import repeat_images
from trol.host.generation import prompt_columns
from trol.host.names import generation_cache
from trol.host.torch_internals import CompileableContextVar

_AT_LEAST = CompileableContextVar("trol_row_lengths")
"""Each row's length once its whole prompt is read [B, 1]; None where its positions tell."""

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
    def forward(
        self, state: Float[Tensor, "..."], position_ids: Integer[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T d"]]:
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
    """Makes a decoder's RoPE, where it depends on the length, look at each row by itself."""
    if goes_by_length(config):
        decoder.rotary_emb = RowRotaryEmbedding(config)


@contextmanager
def rows_known(lengths: Integer[Tensor, " B"]) -> Generator[None]:
    """While prompts are read in chunks: each row's whole length, in tokens [B]."""
    token = _AT_LEAST.set(lengths[:, None])
    try:
        yield
    finally:
        _AT_LEAST.reset(token)


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


class TrolGenerationMixin(GenerationMixin):
    """Repeats images with their rows, and starts the cache anew where a row's RoPE switches."""

    config: Any
    model: Any

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: Any, model_kwargs: Any, **kwargs: Any
    ) -> Any:
        """As transformers does; every chunk of a prompt is rotated as the whole prompt is."""
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        at_hand = _tokens_at_hand(input_ids, embeds)
        # A mask of nothing but ones may be taken away beforehand, and only its length kept.
        columns = prompt_columns(generation_config, at_hand) if mask is None else mask.shape[-1]
        total = max(at_hand, columns)
        cache = generation_cache(model_kwargs)
        self._restart_where_rope_switches(cache, mask, at_hand, total=total)
        tokens = input_ids if embeds is None else embeds
        lengths = tokens.new_full(tokens.shape[:1], total) if mask is None else mask.sum(-1)
        with rows_known(lengths):
            return super()._prefill(  # type: ignore[misc]
                input_ids, generation_config, model_kwargs, **kwargs
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers does; all tokens again where a row outgrows its short RoPE factors."""
        at_hand, cache = _tokens_at_hand(input_ids, inputs_embeds), generation_cache(kwargs)
        prefilling = _AT_LEAST.get() is not None
        if not prefilling and self._restart_where_rope_switches(
            cache, attention_mask, at_hand, new=next_sequence_length or 0
        ):
            next_sequence_length, kwargs["is_first_iteration"] = None, True
            if inputs_embeds is not None:
                new = self.model.get_input_embeddings()(input_ids)
                inputs_embeds = torch.cat([inputs_embeds, new.to(inputs_embeds)], dim=1)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _restart_where_rope_switches(
        self,
        cache: Cache | None,
        mask: torch.Tensor | None,
        at_hand: int,
        *,
        total: int = 0,
        new: int = 0,
    ) -> bool:
        """Empties the cache where some row in it used the short factors and now needs the long.

        Keys made with the short factors do not fit queries made with the long ones, so the whole
        batch is computed again, every row by its own length, as transformers' Phi-3 does for one.
        `DataError` where fewer tokens are at hand than there are: `total`, or `new` ones more than
        in the cache.
        """
        limit = switch_length(self.config.text_config)
        if limit is None or cache is None:
            return False
        past = int(cache.get_seq_length())
        total = max(at_hand, total, past + new)
        if not _switches(limit, past, total, mask):
            return False
        if at_hand < total:
            raise DataError(
                f"the cache holds {past} tokens whose keys were made for texts of at most {limit} "
                f"tokens, and the conversation now has {total}; pass all of its tokens, not only "
                "the new ones, so that the cache can be made anew."
            )
        cache.reset()
        left = int(cache.get_seq_length())
        if left:  # before transformers 5.2x, resetting sets to zero but keeps the length
            cache.crop(-left)
        return True

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Rows repeated for beams, each copy of a row followed by all of its own images."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            mask = self.model.get_placeholder_mask(input_ids, kwargs.get("inputs_embeds"))
            pixels = repeat_images(pixels, mask, self.config.tokens_per_image, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **kwargs,
        )
        return input_ids, kwargs if pixels is None else {**kwargs, "pixel_values": pixels}


def _tokens_at_hand(ids: torch.Tensor, embeds: torch.Tensor | None) -> int:
    """Those of the embeddings, and those of the ids that were generated after them."""
    return ids.shape[1] + (0 if embeds is None else embeds.shape[1])


def _switches(limit: int, past: int, total: int, mask: torch.Tensor | None) -> bool:
    """Whether some row had at most `limit` tokens in the cache and now has more."""
    if not past or total <= limit:
        return False
    if mask is None or mask.ndim != 2:
        return past <= limit
    before, now = mask[:, :past].sum(-1), mask.sum(-1)
    return bool(((before <= limit) & (now > limit)).any())
