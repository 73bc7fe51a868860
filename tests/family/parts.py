"""Small folders of the parts that a model is composed of: vision towers and a text decoder."""

from pathlib import Path

import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from family.samples import enlarged
from trol.data.boards import WORDS
from trol.family.presets import byte_level_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's kind: content is a string, and answers are not marked."""

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}

TOWERS: dict[str, PretrainedConfig] = {
    "dinov2": Dinov2Config(**SIZES, use_mask_token=False),
    "clip": CLIPVisionConfig(**SIZES, intermediate_size=32),
    "siglip": SiglipVisionConfig(**SIZES, intermediate_size=32, vision_use_head=False),
}
"""With a class token in the position table, beside it, and with none."""

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def tower(folder: Path, name: str) -> str:
    """A tower of 6 x 6 patches, and its image processor."""
    torch.manual_seed(0)
    enlarged(AutoModel.from_config(TOWERS[name])).save_pretrained(folder)
    SiglipImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return str(folder)


def decoder(folder: Path) -> str:
    """A Llama with a tied head, whose token table has no row to spare."""
    tokenizer = byte_level_tokenizer([" ".join(WORDS)] * 2, vocabulary=300)
    tokenizer.chat_template = CHATML
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    enlarged(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
