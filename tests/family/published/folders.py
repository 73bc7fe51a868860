"""Makes folders in the layout of the published TroL checkpoints, at tiny size, from a seed."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from family.published.shapes import (
    GRID,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    PATCH,
    VISION_HEADS,
    VISION_HIDDEN,
    VISION_INNER,
    VISION_LAYERS,
    internlm2_shapes,
    phi3_shapes,
)
from family.published.tokens import internlm2_tokenizer, phi3_tokenizer

FAMILIES = ("internlm2", "phi3")


def published_folder(
    path: Path,
    family: str,
    sharing: str = "shared",
    weights: str = "safetensors",
    shards: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gating_file: bool = True,
) -> Path:
    """A folder as published: configuration, weights, gates and tokenizer.

    Args:
        path: the folder to make.
        family: "internlm2" (TroL-1.8B, -7B) or "phi3" (TroL-3.8B).
        sharing: "shared" for one gate L times, "per_layer" for L gates.
        weights: "safetensors" or "bin".
        shards: number of weight files; more than one come with an index.
        seed: of all random numbers.
        dtype: of all weights.
        gating_file: gates in `trol_gating.pt`, or else among the other weights.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokens = {"internlm2": internlm2_tokenizer, "phi3": phi3_tokenizer}[family](path)
    config = {"internlm2": internlm2_config, "phi3": phi3_config}[family](tokens)
    write_json(path / "config.json", {**config, "torch_dtype": str(dtype).removeprefix("torch.")})
    generator = torch.Generator().manual_seed(seed)
    shapes = {"internlm2": internlm2_shapes, "phi3": phi3_shapes}[family](tokens)
    tensors = {name: drawn(shape, generator).to(dtype) for name, shape in shapes.items()}
    gates = {name: tensor.to(dtype) for name, tensor in drawn_gates(sharing, generator).items()}
    if gating_file:
        torch.save(gates, path / "trol_gating.pt")
    else:
        prefix = {"internlm2": "model.", "phi3": "language_model.model."}[family]
        tensors |= {f"{prefix}trol_gating.{name}": tensor for name, tensor in gates.items()}
    write_weights(path, tensors, weights, shards)
    return path


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Vectors (norms, biases, scales) near one, all else near zero."""
    values = 0.15 * torch.randn(shape, generator=generator)
    return values + 1 if len(shape) == 1 else values


def drawn_gates(sharing: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The entries of the gating file: "{i}.weight" [1, D] and "{i}.bias" [1]."""
    entries: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        first = layer == 0 or sharing == "per_layer"
        weight = drawn((1, HIDDEN), generator) if first else entries["0.weight"].clone()
        bias = drawn((1, 1), generator)[0] if first else entries["0.bias"].clone()
        entries |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    return entries


def write_weights(path: Path, tensors: dict[str, torch.Tensor], kind: str, shards: int) -> None:
    """The tensors dealt out to `shards` files, with an index where there are several."""
    stem, end = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[kind]
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        place = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
        file = f"{stem}{place}.{end}"
        held = {name: tensors[name].contiguous() for name in part}
        if kind == "safetensors":
            save_file(held, path / file, metadata={"format": "pt"})
        else:
            torch.save(held, path / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        write_json(path / f"{stem}.{end}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def internlm2_config(vocab_size: int) -> dict[str, Any]:
    """As InternLM-XComposer2's: flat, and silent about the vision tower."""
    return {
        "architectures": ["TroLForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 1.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "use_cache": False,
        "vocab_size": vocab_size,
        "img_size": 5 * PATCH,
        "vision_config": {"num_attention_heads": VISION_HEADS},
    }


def phi3_config(vocab_size: int) -> dict[str, Any]:
    """As InternVL-Chat's: a part each for the decoder and the vision tower."""
    return {
        "architectures": ["TroLForCausalLM"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": GRID * PATCH,
        "llm_config": _phi3_decoder(vocab_size),
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "select_layer": -1,
        "use_thumbnail": True,
        "vision_config": _internvit(),
    }


def _phi3_decoder(vocab_size: int) -> dict[str, Any]:
    half = HIDDEN // HEADS // 2
    factors = {"long_factor": [1.5 + i for i in range(half)], "short_factor": [1.0] * half}
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "original_max_position_embeddings": 1024,
        "pad_token_id": 3,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**factors, "type": "su"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
    }


def _internvit() -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": VISION_HIDDEN,
        "image_size": GRID * PATCH,
        "intermediate_size": VISION_INNER,
        "layer_norm_eps": 1e-06,
        "norm_type": "layer_norm",
        "num_attention_heads": VISION_HEADS,
        "num_channels": 3,
        "num_hidden_layers": VISION_LAYERS,
        "patch_size": PATCH,
        "qk_normalization": False,
        "qkv_bias": True,
    }
