"""What the published checkpoints call their weights, and what becomes of each in a TroL model.

InternLM2 fuses queries, keys and values group by group, one group for each key head; InternViT
fuses them as three blocks. Phi-3's fused maps stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trol.family.configuration import TrolConfig

Part = Callable[[Tensor], Tensor]
"""Makes a tensor of the model from one of the checkpoint."""

SIGNATURES = {
    "internlm2": ("model.tok_embeddings.weight", "vision_proj.0.weight"),
    "phi3": ("language_model.model.embed_tokens.weight", "vision_proj.0.weight"),
}
"""Family -> tensors by which its checkpoints are known."""

GATES = {
    "internlm2": "model.trol_gating.",
    "phi3": "language_model.model.trol_gating.",
}
"""Family -> what precedes the gates' names where they lie among the weights."""

IGNORED = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Ends of names that old checkpoints carry and every model computes for itself."""

TEXT, VISION, PROJECTOR = "model.language_model", "model.vision_tower", "model.projector"


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, the shape it must have, and the model's tensors made of it."""

    name: str
    shape: list[int]
    targets: Mapping[str, Part]


def sources(family: str, config: TrolConfig, positions: int) -> Iterator[Source]:
    """All tensors of a checkpoint but its gates; `positions` rows are in its position table."""
    yield from {"internlm2": _internlm2, "phi3": _phi3}[family](config, positions)


def resize_position_table(table: Tensor, grid: int) -> Tensor:
    """The position table of g x g patches, class token first, for `grid` x `grid` patches.

    Bicubic, not antialiased, corners not aligned, computed in float32. Shapes:
    [..., 1 + g², D] -> [..., 1 + grid², D].
    """
    before = round((table.shape[-2] - 1) ** 0.5)
    if before == grid:
        return table
    first, rest = table[..., :1, :], table[..., 1:, :]
    square = rest.float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(*table.shape[:-2], grid * grid, -1)
    return torch.cat([first, resized.to(table.dtype)], dim=-2)


def _internlm2(config: TrolConfig, positions: int) -> Iterator[Source]:
    text, vision = config.text_config, config.vision_config
    hidden, vocab = text.hidden_size, text.vocab_size
    table = [vocab + text.image_rows, hidden]
    yield _same("model.tok_embeddings.weight", table, f"{TEXT}.embed_tokens.weight")
    for layer in range(text.num_hidden_layers):
        yield from _internlm2_layer(text, f"model.layers.{layer}", f"{TEXT}.layers.{layer}")
    yield _same("model.norm.weight", [hidden], f"{TEXT}.norm.weight")
    yield _same("output.weight", [vocab, hidden], "lm_head.weight")
    yield from _projector(config, {"linear_1": 0, "linear_2": 2})
    yield from _clip(vision, positions, "vit.vision_tower.vision_model", config.patch_grid[0])


def _internlm2_layer(text: Any, name: str, target: str) -> Iterator[Source]:
    hidden, inner, rank = text.hidden_size, text.intermediate_size, text.image_lora_rank
    attended = text.num_attention_heads * text.head_dim
    fused = attended + 2 * text.num_key_value_heads * text.head_dim
    group = text.num_attention_heads // text.num_key_value_heads
    split = {k: partial(_of_groups, which=k, group=group, size=text.head_dim) for k in "qkv"}
    maps: list[tuple[str, list[int], dict[str, Part]]] = [
        ("attention.wqkv", [fused, hidden], {f"self_attn.{k}_proj": split[k] for k in "qkv"}),
        ("attention.wo", [hidden, attended], {"self_attn.o_proj": _whole}),
        ("feed_forward.w1", [inner, hidden], {"mlp.gate_proj": _whole}),
        ("feed_forward.w2", [hidden, inner], {"mlp.down_proj": _whole}),
        ("feed_forward.w3", [inner, hidden], {"mlp.up_proj": _whole}),
    ]
    for old, (out, into), parts in maps:
        # A fused map's A is read by all its parts; each then trains a copy of its own.
        own = _whole if len(parts) == 1 else torch.clone
        for kind, shape, made, part in (
            ("ffn", [out, into], "base", None),
            ("lora_A", [rank, into], "image_down", own),
            ("lora_B", [out, rank], "image_up", None),
        ):
            targets = {f"{target}.{new}.{made}.weight": part or p for new, p in parts.items()}
            yield Source(f"{name}.{old}.{kind}.weight", shape, targets)
    for old, new in (
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
    ):
        yield _same(f"{name}.{old}.weight", [hidden], f"{target}.{new}.weight")


def _phi3(config: TrolConfig, positions: int) -> Iterator[Source]:
    text = config.text_config
    hidden, inner, vocab = text.hidden_size, text.intermediate_size, text.vocab_size
    size = hidden // text.num_attention_heads
    fused = hidden + 2 * text.num_key_value_heads * size
    layer_shapes = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.qkv_proj": [fused, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_up_proj": [2 * inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    shapes = {"embed_tokens": [vocab, hidden], "norm": [hidden]} | {
        f"layers.{layer}.{name}": shape
        for layer in range(text.num_hidden_layers)
        for name, shape in layer_shapes.items()
    }
    for name, shape in shapes.items():
        yield _same(f"language_model.model.{name}.weight", shape, f"{TEXT}.{name}.weight")
    yield _same("language_model.lm_head.weight", [vocab, hidden], "lm_head.weight")
    yield from _projector(config, {"norm": 0, "linear_1": 1, "linear_2": 3})
    yield from _internvit(config.vision_config, positions, config.patch_grid[0])


def _projector(config: TrolConfig, places: dict[str, int]) -> Iterator[Source]:
    width = round(config.vision_config.hidden_size / config.downsample_ratio**2)
    hidden = config.text_config.hidden_size
    inner = config.projector_hidden_size or hidden
    outs = {"norm": [width], "linear_1": [inner, width], "linear_2": [hidden, inner]}
    for name, place in places.items():
        for kind, shape in (("weight", outs[name]), ("bias", outs[name][:1])):
            yield _same(f"vision_proj.{place}.{kind}", shape, f"{PROJECTOR}.{name}.{kind}")


def _clip(vision: Any, positions: int, prefix: str, grid: int) -> Iterator[Source]:
    size, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    shapes: dict[str, list[int]] = {
        "embeddings.class_embedding": [size],
        "embeddings.patch_embedding.weight": [size, vision.num_channels, patch, patch],
        **_with_bias("pre_layrnorm", [size]),
        **_with_bias("post_layernorm", [size]),
    }
    for layer in (f"encoder.layers.{i}" for i in range(vision.num_hidden_layers)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _with_bias(f"{layer}.self_attn.{name}", [size, size])
        shapes |= _with_bias(f"{layer}.layer_norm1", [size])
        shapes |= _with_bias(f"{layer}.layer_norm2", [size])
        shapes |= _with_bias(f"{layer}.mlp.fc1", [inner, size])
        shapes |= _with_bias(f"{layer}.mlp.fc2", [size, inner])
    for name, shape in shapes.items():
        yield _same(f"{prefix}.{name}", shape, f"{VISION}.{name}")
    table = "embeddings.position_embedding.weight"
    resize = partial(resize_position_table, grid=grid)
    yield Source(f"{prefix}.{table}", [positions, size], {f"{VISION}.{table}": resize})


def _internvit(vision: Any, positions: int, grid: int) -> Iterator[Source]:
    size = vision.hidden_size
    embeddings, old = f"{VISION}.embeddings", "vision_model.embeddings"
    resize = partial(resize_position_table, grid=grid)
    yield _same(f"{old}.class_embedding", [1, 1, size], f"{embeddings}.cls_token")
    name, target = f"{old}.position_embedding", f"{embeddings}.position_embeddings"
    yield Source(name, [1, positions, size], {target: resize})
    patches = [size, vision.num_channels, *vision.patch_size]
    for kind, shape in (("weight", patches), ("bias", [size])):
        target = f"{embeddings}.patch_embeddings.projection.{kind}"
        yield _same(f"{old}.patch_embedding.{kind}", shape, target)
    for layer in range(vision.num_hidden_layers):
        yield from _internvit_layer(vision, layer)


def _internvit_layer(vision: Any, layer: int) -> Iterator[Source]:
    old, new = f"vision_model.encoder.layers.{layer}", f"{VISION}.encoder.layer.{layer}"
    size, inner = vision.hidden_size, vision.intermediate_size
    norms = ["weight", "bias"] if vision.norm_type == "layer_norm" else ["weight"]
    for number, place in ((1, "before"), (2, "after")):
        yield _same(f"{old}.ls{number}", [size], f"{new}.lambda_{number}")
        for kind in norms:
            yield _same(f"{old}.norm{number}.{kind}", [size], f"{new}.layernorm_{place}.{kind}")
    for kind in ("weight", "bias") if vision.attention_bias else ("weight",):
        thirds = {
            f"{new}.attention.{name}_proj.{kind}": partial(_third, number=number)
            for number, name in enumerate("qkv")
        }
        shape = [3 * size, size] if kind == "weight" else [3 * size]
        yield Source(f"{old}.attn.qkv.{kind}", shape, thirds)
    if vision.use_qk_norm:
        for name in ("q_norm", "k_norm"):
            yield _same(f"{old}.attn.{name}.weight", [size], f"{new}.attention.{name}.weight")
    for name, target, shape in (
        ("attn.proj", "attention.projection_layer", [size, size]),
        ("mlp.fc1", "mlp.fc1", [inner, size]),
        ("mlp.fc2", "mlp.fc2", [size, inner]),
    ):
        yield _same(f"{old}.{name}.weight", shape, f"{new}.{target}.weight")
        yield _same(f"{old}.{name}.bias", shape[:1], f"{new}.{target}.bias")


def _same(name: str, shape: list[int], target: str) -> Source:
    return Source(name, shape, {target: _whole})


def _with_bias(name: str, shape: list[int]) -> dict[str, list[int]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _third(tensor: Tensor, *, number: int) -> Tensor:
    return tensor.chunk(3)[number]


def _of_groups(tensor: Tensor, *, which: str, group: int, size: int) -> Tensor:
    """Queries, keys or values from rows [kv heads x (group queries, key, value) x size, ...]."""
    groups = tensor.unflatten(0, (-1, group + 2, size))
    part = {"q": groups[:, :group], "k": groups[:, group], "v": groups[:, group + 1]}[which]
    return part.reshape(-1, tensor.shape[-1])
