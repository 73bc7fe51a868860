"""Modules: partial LoRA, the mixing of two visits, pixel shuffle, position table, InternViT."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaModel, Phi3Config
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trol.depth import attach
from trol.family import TrolConfig
from trol.family.internlm2 import _IMAGE_TOKENS, PartialLora
from trol.family.modeling import pixel_shuffle
from trol.family.published.layouts import resize_position_table, sources
from trol.policies.mixer import TrolMixer

from .report import Report

if TYPE_CHECKING:
    from .units import Units


def check_partial_lora(units: Units, report: Report) -> None:
    """Image tokens get W x + (alpha / r) B A x, all others W x; an empty mask is no mask."""
    part, table = units.part("plora"), units.tables["plora"]
    report.tick("plora")
    wide, narrow = part["ffn.weight"].shape
    lora = PartialLora(nn.Linear(narrow, wide), table["r"], table["alpha"], 0.0).eval()
    names = {"ffn.weight": "base.weight", "ffn.bias": "base.bias"}
    names |= {"lora_A.weight": "image_down.weight", "lora_B.weight": "image_up.weight"}
    lora.load_state_dict({names[name]: part[name] for name in names if name in part})
    mask = part["mask"].bool()
    masks = {"out_mask": mask, "out_empty_mask": torch.zeros_like(mask), "out_no_mask": None}
    for name, image_tokens in masks.items():
        token = _IMAGE_TOKENS.set(image_tokens)
        report.close(f"plora.{name}", lora(part["x"]), part[name])
        _IMAGE_TOKENS.reset(token)
    for name in (*names, "x", "mask"):
        report.tick(f"plora.{name}")


class Recorded(LlamaDecoderLayer):
    """A layer whose visits give what was recorded."""

    def __init__(self, config: LlamaConfig, visits: list[Tensor]) -> None:
        super().__init__(config, 0)
        self.visits = iter(visits)

    @functools.wraps(LlamaDecoderLayer.forward)
    def forward(self, *_: Any, **__: Any) -> Tensor:
        return next(self.visits)


def check_mix(units: Units, report: Report) -> None:
    """The gate reads the first visit, and weighs it against the second."""
    part = units.part("mix")
    width = part["weight"].shape[1]
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=width,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    stack = LlamaModel(config).eval()
    stack.layers[0] = Recorded(config, [part["pass1"], part["pass2"]])
    attach(stack, TrolMixer(scope="all"), probe=False)  # a record plays once
    gate = stack.layers[0].depth
    gate.load_state_dict({name: part[name] for name in ("weight", "bias")})
    report.close("mix.score", gate(part["pass1"]), part["score"])
    outs = []
    stack.layers[0].register_forward_hook(lambda _layer, _inputs, out: outs.append(out))
    stack(inputs_embeds=torch.zeros_like(part["pass1"]), use_cache=False)
    report.close("mix.out", outs[0], part["out"])
    for name in ("weight", "bias", "pass1", "pass2"):
        report.tick(f"mix.{name}")


def check_pixel_shuffle(units: Units, report: Report) -> None:
    """One wider feature of each block of neighbours."""
    part = units.part("pixel_shuffle")
    ratio = part["out"].shape[1] / part["x"].shape[1]
    report.close("pixel_shuffle.out", pixel_shuffle(part["x"], ratio), part["out"])
    report.tick("pixel_shuffle.x")


def check_position_table(units: Units, report: Report) -> None:
    """A tower's table for another number of patches."""
    part = units.part("clip_pos")
    grid = round((part["after"].shape[0] - 1) ** 0.5)
    report.close("clip_pos.after", resize_position_table(part["before"], grid), part["after"])
    report.tick("clip_pos.before")


def check_internvit(units: Units, report: Report) -> None:
    """The tower from published weights, at its own size and at another."""
    report.tick("internvit")
    for group in units.groups("internvit"):
        part = units.part(group)
        weights = units.part(f"{group}.w")
        tower = _internvit(units.tables["internvit"], weights)
        for name, want in part.items():
            match = re.fullmatch(r"(\w+)\.last_hidden_state", name)
            if match:
                pixels = part[f"{match[1]}.pixel_values"]
                got = tower(pixel_values=pixels).last_hidden_state
                report.close(f"{group}.{name}", got, want)
                report.tick(f"{group}.{match[1]}.pixel_values")
        for name in weights:
            report.tick(f"{group}.w.{name}")


def _internvit(table: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    vision = InternVLVisionConfig(
        hidden_size=table["hidden_size"],
        intermediate_size=table["intermediate_size"],
        num_hidden_layers=table["layers"],
        num_attention_heads=table["heads"],
        image_size=table["image_size"],
        patch_size=table["patch_size"],
        layer_norm_eps=table["eps"],
        norm_type="layer_norm" if "encoder.layers.0.norm1.bias" in weights else "rms_norm",
        use_qk_norm="encoder.layers.0.attn.q_norm.weight" in weights,
        attention_bias="encoder.layers.0.attn.qkv.bias" in weights,
        hidden_act="gelu",
        use_mean_pooling=True,  # no norm after the last layer
    )
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    text = Phi3Config(
        vocab_size=4, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, **ids
    )
    config = TrolConfig(vision_config=vision, text_config=text)
    state: dict[str, Tensor] = {}
    for source in sources("phi3", config, weights["embeddings.position_embedding"].shape[1]):
        name = source.name.removeprefix("vision_model.")
        if name != source.name:
            for target, made in source.targets.items():
                state[target.removeprefix("model.vision_tower.")] = made(weights[name])
    tower = AutoModel.from_config(vision).eval()
    tower.load_state_dict(state)
    return tower
