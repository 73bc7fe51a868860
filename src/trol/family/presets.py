"""Ready-made TroL configurations: the published sizes, and one that trains in minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    Phi3Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from trol.family.configuration import TrolConfig
from trol.family.internlm2 import InternLM2Config
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


PUBLISHED_DEPTH = {"policy": "trol_mixer", "sharing": "shared"}
"""The released checkpoints have one gate for all layers."""


def trol_1_8b() -> TrolConfig:
    """TroL-1.8B: InternLM2-1.8B, CLIP-L/14 at 490 pixels, 1,225 image tokens."""
    return _internlm2(hidden_size=2048, layers=24, heads=16, intermediate_size=8192)


def trol_3_8b() -> TrolConfig:
    """TroL-3.8B: Phi-3-mini, InternViT-300M on tiles of 448 pixels, 256 image tokens a tile."""
    vision = InternVLVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=448,
        patch_size=14,
        attention_bias=True,
        use_mean_pooling=True,  # InternViT has no norm after its last layer
    )
    text = Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    return TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=32012,
        downsample_ratio=0.5,
        projector_norm=True,
        depth=PUBLISHED_DEPTH,
    )


def trol_7b() -> TrolConfig:
    """TroL-7B: InternLM2-7B, CLIP-L/14 at 490 pixels, 1,225 image tokens."""
    return _internlm2(hidden_size=4096, layers=32, heads=32, intermediate_size=14336)


PUBLISHED: dict[str, Callable[[], TrolConfig]] = {
    "trol-1.8b": trol_1_8b,
    "trol-3.8b": trol_3_8b,
    "trol-7b": trol_7b,
}
"""The dimensions of the released models; without weights."""


def _internlm2(*, hidden_size: int, layers: int, heads: int, intermediate_size: int) -> TrolConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=490,
        patch_size=14,
    )
    text = InternLM2Config(
        vocab_size=92544,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=2,
    )
    return TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=text.vocab_size,
        depth=PUBLISHED_DEPTH,
    )
