"""Ready-made TroL configurations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import LlamaConfig, SiglipImageProcessorPil, SiglipVisionConfig

from trol.family.configuration import TrolConfig
from trol.family.processing import IMAGE_TOKEN, TrolProcessor
from trol.family.word_level import BOS, EOS, PAD, SPECIAL_TOKENS, word_tokenizer

TINY_IMAGE_PIXELS = 48
TINY_PATCH_PIXELS = 16


def tiny(
    vocab_size: int,
    *,
    hidden_size: int = 96,
    layers: int = 4,
    heads: int = 3,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    vision_heads: int = 2,
    positions: int = 512,
    depth: dict[str, Any] | None = None,
) -> TrolConfig:
    """A TroL of well under a million parameters for word tokenizers and 48 x 48 pictures.

    SigLIP tower (3 x 3 patches, so 9 image tokens), projector with learned positions, Llama
    decoder of `layers` layers and `positions` tokens; its special ids are the word tokenizer's.
    """
    vision = SiglipVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=TINY_IMAGE_PIXELS,
        patch_size=TINY_PATCH_PIXELS,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL_TOKENS.index(IMAGE_TOKEN),
        projector_positions=(TINY_IMAGE_PIXELS // TINY_PATCH_PIXELS) ** 2,
        depth=depth,
    )


def tiny_processor(texts: Iterable[str]) -> TrolProcessor:
    """The processor that goes with `tiny`: 48 x 48 pixels in [-1, 1], and the words of `texts`."""
    return TrolProcessor(
        SiglipImageProcessorPil(size={"height": TINY_IMAGE_PIXELS, "width": TINY_IMAGE_PIXELS}),
        word_tokenizer(texts),
        tokens_per_image=(TINY_IMAGE_PIXELS // TINY_PATCH_PIXELS) ** 2,
    )
