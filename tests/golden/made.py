"""Makes a golden set whose numbers are trol's own, for tests of the checker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from family.small import SWITCH, batch, internlm2, phi3
from trol.family.published.layouts import GATES, sources

from .forward import run
from .generation import generate
from .names import WQKV, reader
from .sets import Case
from .training import INPUTS_OF_TRAINING, loss_of, training

PROMPTS = {
    "text_batch_pad": ([0, 0], [9, 5]),
    INPUTS_OF_TRAINING: ([2, 1], [4, 3]),
    "one_token": ([0], [1]),
}
"""Case -> images and words of each row."""


def make_set(folder: Path, arch: str) -> None:
    """Writes all files of a set for a small random model of this architecture."""
    model = {"internlm2": internlm2, "phi3": phi3}[arch]()
    _share_downs(model)
    config = settings_of(model, arch)
    inputs: dict[str, Tensor] = {}
    cases = [_case(model, name, inputs) for name in PROMPTS]
    trained = cases[1]
    unread = (trained.mask == 0) | (trained.ids == model.config.image_token_id)
    labels = trained.ids.masked_fill(unread, -100)
    inputs["train.labels"] = labels
    expected, facts = _expected(model, config, cases, labels)
    save_file(weights_of(model, arch), folder / "weights.safetensors")
    save_file(inputs, folder / "inputs.safetensors")
    save_file(expected, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "expected.json").write_text(json.dumps(facts), encoding="utf-8")


def _share_downs(model: Any) -> None:
    """Queries, keys and values come from one fused map, whose A they have in common."""
    for layer in model.model.language_model.layers:
        maps: list[Any] = [getattr(layer.self_attn, f"{x}_proj", None) for x in "qkv"]
        for one in maps[1:]:
            if hasattr(one, "image_down"):
                one.image_down.load_state_dict(maps[0].image_down.state_dict())


def settings_of(model: Any, arch: str) -> dict[str, Any]:
    """The settings as a set has them."""
    text, vision = model.config.text_config, model.config.vision_config
    same = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_size", "intermediate_size")
    same += ("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    settings = {name: getattr(text, name) for name in (*same, "rms_norm_eps")} | {
        "arch": arch,
        "max_position_embeddings": text.max_position_embeddings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "new_tokens": 4,
        "image_token_index": model.config.image_token_id,
        "tokens_per_image": model.config.tokens_per_image,
        "vision_hidden": vision.hidden_size,
        "vision_intermediate": vision.intermediate_size,
        "vision_heads": vision.num_attention_heads,
        "vision_layers": vision.num_hidden_layers,
    }
    if arch == "internlm2":
        lora = {"lora_r": text.image_lora_rank, "lora_alpha": text.image_lora_alpha}
        size = {"image_resolution": vision.image_size, "patch_size": vision.patch_size}
        return settings | lora | size
    factors = {name: text.rope_parameters[name] for name in ("short_factor", "long_factor")}
    return settings | {
        "original_max_position_embeddings": SWITCH,
        "rope_scaling": {"type": "su", **factors},
        "downsample_ratio": model.config.downsample_ratio,
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "vision_layer_norm_eps": vision.layer_norm_eps,
        "norm_type": vision.norm_type,
        "qk_normalization": vision.use_qk_norm,
        "qkv_bias": vision.attention_bias,
    }


def weights_of(model: Any, arch: str) -> dict[str, Tensor]:
    """All weights under upstream's names: what is split in trol is fused again."""
    state, value = model.state_dict(), reader(model, lambda parameter: parameter.data)
    positions = next(v for k, v in state.items() if ".position_embedding" in k).shape[-2]
    weights: dict[str, Tensor] = {}
    for source in sources(arch, model.config, positions):
        parts = [state[name] for name in source.targets]
        fused = parts[0] if len(parts) == 1 or "lora_A" in source.name else torch.cat(parts)
        fused = value(source.name) if _is_grouped(source.name) else fused
        weights[source.name] = cast(Tensor, fused).clone()
    for layer in range(model.config.text_config.num_hidden_layers):
        for kind in ("weight", "bias"):
            name = f"{GATES[arch]}{layer}.{kind}"
            weights[name] = cast(Tensor, value(name)).clone()
    return weights


def _is_grouped(name: str) -> bool:
    match = WQKV.match(name)
    return match is not None and match[2] != "lora_A"


def _case(model: Any, name: str, inputs: dict[str, Tensor]) -> Case:
    images, words = PROMPTS[name]
    made = batch(model, images, words)
    mask = made["attention_mask"]
    made["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    if sum(images):
        with torch.no_grad():
            made["image_features"] = model.model.get_vision_features(made["pixel_values"])
    inputs |= {f"{name}.{kind}": tensor.contiguous() for kind, tensor in made.items()}
    features, pixels = made.get("image_features"), made.get("pixel_values")
    return Case(
        name, made["input_ids"], mask, made["position_ids"], tuple(images), features, pixels
    )


def _expected(
    model: Any, config: dict[str, Any], cases: list[Case], labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    expected: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for case in cases:
        record, tensors = run(model, case)
        expected |= {f"{case.name}.{kind}": tensor for kind, tensor in tensors.items()}
        facts[f"{case.name}.gate_calls"] = record.gate_calls
        _, out = generate(model, config, case)
        expected[f"{case.name}.gen_ids"] = out.sequences
        expected[f"{case.name}.gen_logits"] = torch.stack(out.logits, dim=1)
    with training(model):
        loss = loss_of(model, cases[1], labels)
        loss.backward()
        gradient = reader(model, lambda parameter: parameter.grad)
        made = {name: gradient(name) for name in weights_of(model, config["arch"])}
        expected |= {f"train.grad.{n}": g for n, g in made.items() if g is not None}
    expected["train.loss"] = loss.detach()[None]
    return {name: tensor.contiguous().clone() for name, tensor in expected.items()}, facts
