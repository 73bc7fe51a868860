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
TINY_TOKENS = (TINY_IMAGE_PIXELS // TINY_PATCH_PIXELS) ** 2
TINY_HEAD_SIZE = 32
"""Of every attention head; the smallest that serving engines take."""


def tiny(
    vocab_size: int,
    *,
    hidden_size: int = 96,
    layers: int = 4,
    heads: int = 4,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    positions: int = 512,
    depth: dict[str, Any] | None = None,
) -> TrolConfig:
    """A TroL of well under a million parameters for word tokenizers and 48 x 48 pictures.

    SigLIP tower (3 x 3 patches, 9 image tokens), projector with learned positions, Llama decoder
    for at most `positions` tokens; its special ids are the word tokenizer's.
    """
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=TINY_HEAD_SIZE,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return TrolConfig(
        vision_config=_tower(vision_hidden_size, vision_layers),
        text_config=text,
        image_token_id=SPECIAL_TOKENS.index(IMAGE_TOKEN),
        projector_positions=TINY_TOKENS,
        depth=depth,
    )


def _tower(hidden_size: int, layers: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // TINY_HEAD_SIZE,
        image_size=TINY_IMAGE_PIXELS,
        patch_size=TINY_PATCH_PIXELS,
        vision_use_head=False,
    )


def tiny_processor(texts: Iterable[str]) -> TrolProcessor:
    """The processor that goes with `tiny`: 48 x 48 pixels in [-1, 1], and the words of `texts`."""
    return TrolProcessor(
        SiglipImageProcessorPil(size={"height": TINY_IMAGE_PIXELS, "width": TINY_IMAGE_PIXELS}),
        word_tokenizer(texts),
        tokens_per_image=TINY_TOKENS,
    )
