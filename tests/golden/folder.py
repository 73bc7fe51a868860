"""Writes a golden set as a folder in the layout of the published checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .sets import GoldenSet


def publish(golden: GoldenSet, folder: Path) -> None:
    """`config.json` and `model.safetensors`, as they would lie on the hub."""
    config = {"internlm2": _internlm2, "phi3": _phi3}[golden.arch](golden.config)
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(golden.folder / "weights.safetensors", folder / "model.safetensors")


LLM_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "vocab_size",
)


def _llm(config: dict[str, Any]) -> dict[str, Any]:
    settings = {key: config[key] for key in LLM_KEYS if key in config}
    return {**settings, "hidden_act": "silu", "tie_word_embeddings": False}


def _vision(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": config["vision_hidden"],
        "intermediate_size": config["vision_intermediate"],
        "num_attention_heads": config["vision_heads"],
        "num_hidden_layers": config["vision_layers"],
        "patch_size": config["patch_size"],
    }


def _internlm2(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's settings lie flat. The hub's own files name no tower; a small one must."""
    return {
        "architectures": ["TroLForCausalLM"],
        "model_type": "internlm2",
        **_llm(config),
        "attn_implementation": "flash_attention_2",
        "bias": False,
        "image_token_index": config["image_token_index"],
        "lora_r": config["lora_r"],
        "lora_alpha": config["lora_alpha"],
        "vision_config": {**_vision(config), "image_size": config["image_resolution"]},
    }


def _phi3(config: dict[str, Any]) -> dict[str, Any]:
    """Decoder and tower each have a section of their own."""
    return {
        "architectures": ["TroLForCausalLM"],
        "model_type": "internvl_chat",
        "downsample_ratio": config["downsample_ratio"],
        "force_image_size": config["image_size"],
        "image_token_index": config["image_token_index"],
        "llm_config": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **_llm(config)},
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **_vision(config),
            "image_size": config["image_size"],
            "hidden_act": "gelu",
            "layer_norm_eps": config["vision_layer_norm_eps"],
            "norm_type": config["norm_type"],
            "qk_normalization": config["qk_normalization"],
            "qkv_bias": config["qkv_bias"],
        },
    }
