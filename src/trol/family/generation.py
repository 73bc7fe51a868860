"""Generation with images and with RoPE that switches: what transformers' own cannot know."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, GenerationMixin

from trol.errors import DataError
from trol.family.placeholders import repeat_images
from trol.family.rope import rows_are_known, rows_known, switch_length
from trol.host.generation import prompt_columns
from trol.host.names import generation_cache


class TrolGenerationMixin(GenerationMixin):
    """Repeats images with their rows, and starts the cache anew where a row's RoPE switches."""

    config: Any
    model: Any

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: Any, model_kwargs: Any, **kwargs: Any
    ) -> Any:
        """As transformers does; every chunk of a prompt is rotated as the whole prompt is."""
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        held = _held(input_ids, embeds)
        # A mask of nothing but ones may be taken away beforehand, and only its length kept.
        known = prompt_columns(generation_config, held) if mask is None else mask.shape[-1]
        total = max(held, known)
        self._start_anew_where_rope_switches(
            generation_cache(model_kwargs), mask, held=held, total=total
        )
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
        held, cache = _held(input_ids, inputs_embeds), generation_cache(kwargs)
        if not rows_are_known() and self._start_anew_where_rope_switches(
            cache, attention_mask, held=held, new=next_sequence_length or 0
        ):
            next_sequence_length, kwargs["is_first_iteration"] = None, True
            if inputs_embeds is not None:
                made = self.model.get_input_embeddings()(input_ids)
                inputs_embeds = torch.cat([inputs_embeds, made.to(inputs_embeds)], dim=1)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _start_anew_where_rope_switches(
        self,
        cache: Cache | None,
        mask: torch.Tensor | None,
        *,
        held: int,
        total: int = 0,
        new: int = 0,
    ) -> bool:
        """Empties the cache where some row in it used the short factors and now needs the long.

        Keys made with the short factors do not fit queries made with the long ones, so the whole
        batch is computed again, every row by its own length, as transformers' Phi-3 does for one.
        `DataError` where fewer tokens are at hand (`held`) than there are: `total`, or `new` ones
        more than in the cache.
        """
        limit = switch_length(self.config.text_config)
        if limit is None or cache is None:
            return False
        past = int(cache.get_seq_length())
        total = max(held, total, past + new)
        if not _switches(limit, past, total, mask):
            return False
        if held < total:
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


def _held(ids: torch.Tensor, embeds: torch.Tensor | None) -> int:
    """How many tokens are at hand: embeddings come before the ids made since."""
    return ids.shape[1] + (0 if embeds is None else embeds.shape[1])


def _switches(limit: int, past: int, total: int, mask: torch.Tensor | None) -> bool:
    """Whether some row had at most `limit` tokens in the cache and now has more."""
    if not past or total <= limit:
        return False
    if mask is None or mask.ndim != 2:
        return past <= limit
    before, now = mask[:, :past].sum(-1), mask.sum(-1)
    return bool(((before <= limit) & (now > limit)).any())
