"""The published architectures, small: partial LoRA on image tokens; RoPE that switches."""

import torch
from transformers import CLIPVisionConfig, Phi3Config
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from family.samples import enlarged
from trol.family import InternLM2Config, TrolConfig, TrolForConditionalGeneration

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SWITCH = 16
"""The most tokens for which the small Phi-3 uses its short factors."""


def internlm2(**text) -> TrolForConditionalGeneration:
    """9 image tokens an image, whose id is the first after the vocabulary."""
    config = TrolConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=12, patch_size=4),
        text_config=InternLM2Config(
            **{**TEXT, "image_lora_rank": 4, "image_lora_alpha": 8, "image_lora_dropout": 0.0}
            | text
        ),
        image_token_id=TEXT["vocab_size"],
    )
    torch.manual_seed(0)
    return enlarged(TrolForConditionalGeneration(config))


def phi3(sharing: str = "shared") -> TrolForConditionalGeneration:
    """4 image tokens a tile, whose id is 59; short RoPE factors up to 16 tokens."""
    factors = torch.linspace(1, 3, 4).tolist()
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": factors,
        "original_max_position_embeddings": SWITCH,
    }
    config = TrolConfig(
        vision_config=InternVLVisionConfig(
            **VISION, image_size=16, patch_size=4, use_mean_pooling=True
        ),
        text_config=Phi3Config(
            **TEXT,
            max_position_embeddings=96,
            original_max_position_embeddings=SWITCH,
            rope_parameters=rope,
        ),
        image_token_id=59,
        downsample_ratio=0.5,
        projector_norm=True,
        depth={"policy": "trol_mixer", "sharing": sharing},
    )
    torch.manual_seed(0)
    return enlarged(TrolForConditionalGeneration(config))


def batch(model, images: list[int], words: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded rows with so many images (or tiles) and words each."""
    generator = torch.Generator().manual_seed(seed)
    per_image, image = model.config.tokens_per_image, model.config.image_token_id
    lengths = [n * per_image + w for n, w in zip(images, words, strict=True)]
    ids = torch.zeros(len(images), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (count, length) in enumerate(zip(images, lengths, strict=True)):
        own = torch.randint(3, 55, (length,), generator=generator)
        own[1 : 1 + count * per_image] = image
        ids[row, -length:], mask[row, -length:] = own, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        side = model.config.vision_config.image_size
        side = side if isinstance(side, int) else side[0]
        pixels = torch.randn(sum(images), 3, side, side, generator=generator)
        inputs["pixel_values"] = pixels
    return inputs


def alone(inputs: dict[str, torch.Tensor], row: int, images: list[int]) -> dict[str, torch.Tensor]:
    """One row of a batch, without its padding, with its own images."""
    real = inputs["attention_mask"][row].bool()
    own = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    if images[row]:
        start = sum(images[:row])
        own["pixel_values"] = inputs["pixel_values"][start : start + images[row]]
    return own
