"""What the published checkpoints call their weights, and what becomes of each in a TroL model.

InternLM2 fuses queries, keys and values group by group, one group for each key head; InternViT
fuses them as three blocks. Phi-3's fused maps stay as they are. The gates lie in a file of their
own or among the weights: L entries, which may all be the same one. Tensors are read when they are
asked for.
"""

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from trol.errors import DataError
from trol.family.configuration import TrolConfig
from trol.family.published.configs import POSITIONS, position_grid
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


RENAMES = {
    "internlm2": (
        (r"^lm_head", "output"),
        (rf"^{TEXT}.embed_tokens", "model.tok_embeddings"),
        (rf"^{TEXT}", "model"),
        (rf"^{PROJECTOR}.linear_1", "vision_proj.0"),
        (rf"^{PROJECTOR}.linear_2", "vision_proj.2"),
        (rf"^{VISION}", "vit.vision_tower.vision_model"),
        (r"self_attn.[qkv]_proj.(base|image)", r"attention.wqkv.\1"),
        (r"self_attn.o_proj.(base|image)", r"attention.wo.\1"),
        (r"mlp.gate_proj", "feed_forward.w1"),
        (r"mlp.down_proj", "feed_forward.w2"),
        (r"mlp.up_proj", "feed_forward.w3"),
        (r"base", "ffn"),
        (r"image_down", "lora_A"),
        (r"image_up", "lora_B"),
        (r"input_layernorm", "attention_norm"),
        (r"post_attention_layernorm", "ffn_norm"),
    ),
    "phi3": (
        (r"^lm_head", "language_model.lm_head"),
        (rf"^{TEXT}", "language_model.model"),
        (rf"^{PROJECTOR}.norm", "vision_proj.0"),
        (rf"^{PROJECTOR}.linear_1", "vision_proj.1"),
        (rf"^{PROJECTOR}.linear_2", "vision_proj.3"),
        (rf"^{VISION}.encoder.layer", "vision_model.encoder.layers"),
        (rf"^{VISION}", "vision_model"),
        (r"cls_token", "class_embedding"),
        (r"position_embeddings", "position_embedding"),
        (r"patch_embeddings.projection", "patch_embedding"),
        (r"attention.[qkv]_proj", "attn.qkv"),
        (r"attention.projection_layer", "attn.proj"),
        (r"attention.([qk])_norm", r"attn.\1_norm"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"lambda_", "ls"),
    ),
}
"""Family -> patterns in the model's names of weights, in order, and what its checkpoints write."""


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, the shape it must have, and the model's tensors made of it."""

    name: str
    shape: list[int]
    targets: Mapping[str, Part]


def sources(family: str, config: TrolConfig, positions: int) -> Iterator[Source]:
    """All tensors of a checkpoint but its gates; `positions` rows are in its position table."""
    targets: dict[str, dict[str, list[int]]] = {}
    for target, shape in _shapes(config).items():
        name = target
        for pattern, replacement in RENAMES[family]:
            name = re.sub(pattern, replacement, name)
        targets.setdefault(name, {})[target] = shape
    for name, shapes in targets.items():
        first, parts = next(iter(shapes.values())), {t: _part(family, t, config) for t in shapes}
        if name == POSITIONS[family]:
            yield Source(name, [*first[:-2], positions, first[-1]], parts)
        elif name.endswith(".lora_A.weight"):
            # A fused map's A is read by all its parts; each then trains a copy of its own.
            copies = dict.fromkeys(shapes, torch.clone)
            yield Source(name, first, copies if len(shapes) > 1 else parts)
        else:
            rows = sum(shape[0] for shape in shapes.values())
            yield Source(name, [rows, *first[1:]], parts)


def _shapes(config: TrolConfig) -> dict[str, list[int]]:
    """The shapes of the model's weights by their names, all but those of the gates."""
    text, vision = config.text_config, config.vision_config
    shapes: dict[str, list[int]] = {}
    with torch.device("meta"):
        for name, part in ((TEXT, text), (VISION, vision)):
            # By its class: AutoModel.from_config would shard the weights under ZeRO-3.
            cls: Any = MODEL_MAPPING[type(part)]
            weights = cls(copy.deepcopy(part)).state_dict()
            shapes |= {f"{name}.{key}": list(tensor.shape) for key, tensor in weights.items()}
    width, hidden = round(vision.hidden_size / config.downsample_ratio**2), text.hidden_size
    inner = config.projector_hidden_size or hidden
    maps = {"linear_1": [inner, width], "linear_2": [hidden, inner]}
    if config.projector_norm:
        maps["norm"] = [width]
    for name, shape in maps.items():
        shapes |= {f"{PROJECTOR}.{name}.weight": shape, f"{PROJECTOR}.{name}.bias": shape[:1]}
    return {**shapes, "lm_head.weight": [text.vocab_size, hidden]}


def _part(family: str, target: str, config: TrolConfig) -> Part:
    """What makes this tensor of the model from the checkpoint's."""
    if target.endswith(("position_embedding.weight", "position_embeddings")):
        return partial(resize_position_table, grid=config.patch_grid[0])
    if family == "phi3":
        third = re.match(rf"{VISION}.*attention.([qkv])_proj", target)
        return _whole if third is None else partial(_third, number="qkv".index(third[1]))
    fused = re.match(rf"{TEXT}.*self_attn.([qkv])_proj", target)
    if fused is None:
        return _whole
    text = config.text_config
    group = text.num_attention_heads // text.num_key_value_heads
    return partial(_of_groups, which=fused[1], group=group, size=text.head_dim)


def resize_position_table(table: Tensor, grid: int) -> Tensor:
    """The position table of g x g patches for `grid` x `grid` patches.

    A class token's row, c = 1, comes first, or there is none, c = 0. Bicubic, not antialiased,
    corners not aligned, computed in float32. Shapes: [..., c + g², D] -> [..., c + grid², D].
    """
    before = math.isqrt(table.shape[-2])
    if before == grid:
        return table
    own = table.shape[-2] - before**2
    first, rest = table[..., :own, :], table[..., own:, :]
    square = rest.float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(*table.shape[:-2], grid * grid, -1)
    return torch.cat([first, resized.to(table.dtype)], dim=-2)


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
