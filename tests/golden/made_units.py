"""Makes numbers of single components by plain formulas, for tests of the checks of `units`.

Nothing here is trol's: each part is what its check must find, from the definition alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import made_pictures, made_texts, made_tower, unit_pictures, unit_rope, unit_texts
from . import unit_vision as vision
from .bicubic import enlarged_table
from .sets import UNIT_FILES
from .units import Units

Tensors = dict[str, Tensor]
Tables = dict[str, Any]

ROPE = {"base": 100, "dim": 8, "max_position_embeddings": 6}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.5, 3.0]}


def _frequencies(base: float, dim: int) -> Tensor:
    return base ** -(torch.arange(0, dim, 2).double() / dim)


def _cos_and_sin(frequencies: Tensor, count: int, scale: float = 1.0) -> Tensors:
    angles = torch.outer(torch.arange(count).double(), frequencies).repeat(1, 2)
    return {"cos": (angles.cos() * scale).float(), "sin": (angles.sin() * scale).float()}


def _internlm2_rope() -> tuple[Tensors, Tables]:
    """Positions / 2 for linear; for dynamic, θ (2 n / m - 1)^(d / (d - 2)) beyond m tokens.

    The last call has the base of the longest before it, as upstream's.
    """
    base, dim, most = ROPE["base"], ROPE["dim"], ROPE["max_position_embeddings"]
    short, long = 5, 9
    stretched = base * (2 * long / most - 1) ** (dim / (dim - 2))
    plain = _frequencies(base, dim)
    beyond = {"default": plain, "linear2": plain / 2, "dynamic2": _frequencies(stretched, dim)}
    within = beyond | {"dynamic2": plain}
    tensors = {}
    for kind in beyond:
        calls = {f"a_len{short}": (within, short), f"b_len{long}": (beyond, long)}
        calls[f"c_len{short}_after_{long}"] = beyond, short
        for call, (frequencies, count) in calls.items():
            for name, made in _cos_and_sin(frequencies[kind], count).items():
                tensors[f"rope.internlm2.{kind}.{call}.{name}"] = made
    return tensors, {"rope.internlm2": ROPE}


def _phi3_rope() -> tuple[Tensors, Tables]:
    """1 / (f_i θ^(2i/d)): short f up to the original length, long f beyond; cos and sin scaled."""
    original, most = 8, 16
    plain, scale = _frequencies(ROPE["base"], ROPE["dim"]), most / original
    scales = {"su": math.sqrt(1 + math.log(scale) / math.log(original))}
    scales["yarn"] = 0.1 * math.log(scale) + 1
    tensors = {}
    for count, factors in ((original, "short_factor"), (original + 1, "long_factor")):
        calls = {kind: (plain / torch.tensor(FACTORS[factors]), scales[kind]) for kind in scales}
        for kind, (frequencies, size) in (calls | {"default": (plain, 1.0)}).items():
            for name, made in _cos_and_sin(frequencies, count, size).items():
                tensors[f"rope.phi3.{kind}.len{count}.{name}"] = made[None]
    lengths = {"max_position_embeddings": most, "original_max_position_embeddings": original}
    return tensors, {"rope.phi3": ROPE | FACTORS | lengths}


def _apply() -> tuple[Tensors, Tables]:
    """Number i and number i + d / 2 of a head are one complex number, turned by its angle."""
    dim = ROPE["dim"]
    position_ids = torch.tensor([[0, 1, 2], [1, 1, 4]])
    angles = position_ids[:, None, :, None] * _frequencies(ROPE["base"], dim)
    tensors = {"position_ids": position_ids}
    for name, heads in (("q", 3), ("k", 1)):
        state = torch.randn(2, heads, 3, dim)
        turned = torch.complex(*state.double().chunk(2, -1)) * torch.polar(
            torch.ones_like(angles), angles
        )
        tensors |= {name: state, f"{name}_out": torch.cat([turned.real, turned.imag], -1).float()}
    tables = {"rope.internlm2": {"base": ROPE["base"]}}
    return {f"rope.apply.{name}": made for name, made in tensors.items()}, tables


def _partial_lora() -> tuple[Tensors, Tables]:
    """W x + b, and (alpha / r) B A x more where the mask is set."""
    table, x = {"r": 2, "alpha": 6}, torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.uint8)
    weight, bias, down, up = (torch.randn(*shape) for shape in ((5, 4), (5,), (2, 4), (5, 2)))
    plain = torch.einsum("ow,btw->bto", weight, x) + bias
    more = torch.einsum("or,rw,btw->bto", up, down, x) * table["alpha"] / table["r"]
    tensors = {"ffn.weight": weight, "ffn.bias": bias, "lora_A.weight": down, "lora_B.weight": up}
    tensors |= {"x": x, "mask": mask, "out_mask": plain + more * mask[..., None]}
    tensors |= {"out_empty_mask": plain, "out_no_mask": plain.clone()}
    return {f"plora.{name}": made for name, made in tensors.items()}, {"plora": table}


def _mix() -> tuple[Tensors, Tables]:
    """a (1 - s) + b s, where s = 0.5 tanh(w · a + bias) + 0.5."""
    a, b, weight, bias = (torch.randn(*shape) for shape in ((2, 3, 6), (2, 3, 6), (1, 6), (1,)))
    score = 0.5 * torch.tanh((a * weight).sum(-1) + bias) + 0.5
    out = a * (1 - score[..., None]) + b * score[..., None]
    tensors = {"pass1": a, "pass2": b, "weight": weight, "bias": bias, "score": score, "out": out}
    return {f"mix.{name}": made for name, made in tensors.items()}, {}


def _pixel_shuffle() -> tuple[Tensors, Tables]:
    """Four neighbours side by side, row by row."""
    x = torch.randn(2, 4, 6, 3)
    out = torch.cat([x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=-1)
    return {"pixel_shuffle.x": x, "pixel_shuffle.out": out}, {}


def _position_table() -> tuple[Tensors, Tables]:
    """The first row stays; the others are a square of 3 x 3, which becomes one of 5 x 5."""
    before = torch.randn(10, 4)
    return {"clip_pos.before": before, "clip_pos.after": enlarged_table(before, 5, 5)}, {}


PARTS: dict[Callable[..., None], Callable[[], tuple[Tensors, Tables]]] = {
    unit_rope.check_internlm2: _internlm2_rope,
    unit_rope.check_phi3: _phi3_rope,
    unit_rope.check_apply: _apply,
    vision.check_partial_lora: _partial_lora,
    vision.check_mix: _mix,
    vision.check_pixel_shuffle: _pixel_shuffle,
    vision.check_position_table: _position_table,
    vision.check_internvit: made_tower.internvit,
    unit_pictures.check_resize: made_pictures.resizes,
    unit_pictures.check_small_tiles: made_pictures.small_tiles,
    unit_pictures.check_tables: made_pictures.tile_tables,
    unit_texts.check_filtering: made_texts.filtering,
    unit_texts.check_prompts: lambda: ({}, {}),
}
"""What each check reads, made anew; the prompts lie in a file of their own."""


def part_of(check: Callable[..., None]) -> Units:
    """The tensors and tables (or the prompts) that this check reads, and no others."""
    torch.manual_seed(0)
    prompts = made_texts.prompts() if check is unit_texts.check_prompts else {}
    return Units(*PARTS[check](), prompts)


def make_units(folder: Path) -> None:
    """Writes the whole set into `folder`, and the prompts beside it."""
    parts = [part_of(check) for check in PARTS]
    tensors = {name: made for part in parts for name, made in part.tensors.items()}
    # Two checks read one table: the first reads all of it.
    tables = {name: made for part in reversed(parts) for name, made in part.tables.items()}
    prompts = {name: made for part in parts for name, made in part.prompts.items()}
    described, numbers = (folder / name for name in UNIT_FILES)
    folder.mkdir()
    save_file({name: made.contiguous() for name, made in tensors.items()}, numbers)
    described.write_text(json.dumps(tables), encoding="utf-8")
    (folder.parent / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
