"""What the published checkpoints call their weights, and what becomes of each in a TroL model.

InternLM2 fuses queries, keys and values group by group, one group for each key head; InternViT
fuses them as three blocks. Phi-3's fused maps stay as they are. The gates lie in a file of their
own or among the weights: L entries, which may all be the same one. Tensors are read when they are
asked for.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trol.errors import DataError
from trol.family.configuration import TrolConfig
from trol.family.published.configs import position_grid
from trol.family.published.files import CURE, GATING, Checkpoint, read_pickled

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
        for kind, shape, inner_name, part in (
            ("ffn", [out, into], "base", None),
            ("lora_A", [rank, into], "image_down", own),
            ("lora_B", [out, rank], "image_up", None),
        ):
            targets = {f"{target}.{n}.{inner_name}.weight": part or p for n, p in parts.items()}
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


@dataclass(frozen=True)
class Lazy:
    """A tensor of the model that is read from its file when `[...]` is asked of it.

    transformers asks just this of the values of a state dict, one after the other.
    """

    checkpoint: Checkpoint
    name: str
    part: Part

    def __getitem__(self, index: Any) -> Tensor:
        return self.part(self.checkpoint.read(self.name))[index]


Weights = Mapping[str, Lazy | Tensor]
"""Name in the model -> the tensor, or what reads it."""


def mapped(checkpoint: Checkpoint, family: str, config: TrolConfig) -> dict[str, Lazy]:
    """All weights but the gates.

    Raises:
        DataError: a tensor is missing, has another shape, or does not belong there.
    """
    positions = position_grid(checkpoint, family) ** 2 + 1
    expected = {source.name: source for source in sources(family, config, positions)}
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        files = ", ".join(file.name for file in checkpoint.files())
        raise DataError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(expected)} tensors of a "
            f"{family} checkpoint, first {missing[0]!r}: in none of {files}; {CURE}."
        )
    surplus = [n for n in checkpoint.names() if n not in expected and not n.endswith(IGNORED)]
    surplus = [name for name in surplus if not name.startswith(GATES[family])]
    if surplus:
        raise DataError(
            f"{checkpoint.file(surplus[0])} holds {surplus[0]!r}, one of {len(surplus)} tensors "
            f"that a {family} checkpoint of this size does not have; check that config.json and "
            "the weight files come from the same checkpoint."
        )
    for name, source in expected.items():
        if (shape := checkpoint.shape(name)) != source.shape:
            raise DataError(
                f"{checkpoint.file(name)}: {name!r} has the shape {shape}, expected "
                f"{source.shape} by config.json and the other tensors; {CURE}."
            )
    return {
        target: Lazy(checkpoint, name, part)
        for name, source in expected.items()
        for target, part in source.targets.items()
    }


def read_gates(
    checkpoint: Checkpoint, family: str, layers: int, width: int
) -> tuple[str, dict[str, Tensor]]:
    """'shared' or 'per_layer', and the gates by their names in the model; of shared ones one.

    They come from their own file, or from among the weights where there is no such file. Gates
    that differ are 'per_layer', with a warning.

    Raises:
        DataError: there are none, the file is damaged, or they do not fit the decoder's layers.
    """
    file, prefix, place = checkpoint.folder / GATING, GATES[family], str(checkpoint.folder)
    if file.is_file():
        place, entries = str(file), read_pickled(file, mmap=False)
    else:
        names = [name for name in checkpoint.names() if name.startswith(prefix)]
        entries = {name.removeprefix(prefix): checkpoint.read(name) for name in names}
        if not entries:
            raise DataError(
                f"{checkpoint.folder} is no TroL checkpoint: it has neither {GATING} nor tensors "
                f"called {prefix}0.weight and so on; put {GATING} beside its weights."
            )
    _check_gates(entries, place, layers, width)
    sharing = _sharing(entries, place, layers)
    return sharing, {
        f"{TEXT}.layers.{layer}.depth.{kind}": entries[f"{layer}.{kind}"]
        for layer in range(1 if sharing == "shared" else layers)
        for kind in ("weight", "bias")
    }


def _check_gates(entries: dict[str, Tensor], place: str, layers: int, width: int) -> None:
    """`DataError` unless '{layer}.weight' [1, D] and '{layer}.bias' [1] are finite, and all."""
    kinds = {"weight": [1, width], "bias": [1]}
    expected = {f"{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()}
    missing, surplus = expected.keys() - entries.keys(), entries.keys() - expected.keys()
    cure = f"take the {GATING} that was published with these weights"
    if missing or surplus:
        raise DataError(
            f"{place} holds gates for {len(entries) / 2:g} layers, the decoder has {layers}: "
            f"missing {_few(missing)}, surplus {_few(surplus)}; {cure}."
        )
    for name, shape in expected.items():
        if list(entries[name].shape) != shape:
            raise DataError(
                f"{place}: {name!r} has the shape {list(entries[name].shape)}, expected {shape}, "
                f"the width of the decoder; {cure}."
            )
        if not entries[name].isfinite().all():
            raise DataError(
                f"{place}: {name!r} has values that are infinite or no numbers, expected finite "
                f"ones; {CURE}."
            )


def _sharing(entries: dict[str, Tensor], place: str, layers: int) -> str:
    distances = {
        layer: max(
            float((entries[f"{layer}.{kind}"].float() - entries[f"0.{kind}"].float()).abs().max())
            for kind in ("weight", "bias")
        )
        for layer in range(1, layers)
    }
    others = [layer for layer, distance in distances.items() if distance > 0]
    if not others:
        return "shared"
    warnings.warn(
        f"the gates in {place} differ: those of the layers {_few(others)} are not layer 0's (by up "
        f"to {max(distances.values()):.3g}). Each layer gets its own; the official code would use "
        f"the last one, number {layers - 1}, in all layers.",
        UserWarning,
        stacklevel=_callers_level(),
    )
    return "per_layer"


def _callers_level() -> int:
    """The `stacklevel`, for a warning of the calling function, of the code that called trol."""
    level, frame = 0, inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in ("trol", "functools"):
            return level
        level, frame = level + 1, frame.f_back
    return level


def _few(items: object) -> str:
    """At most four of them, in order."""
    ordered = sorted(items)  # type: ignore[call-overload]
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(map(str, ordered[:4])) + more if ordered else "none"
