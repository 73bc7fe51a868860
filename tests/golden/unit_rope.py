"""RoPE: cos and sin of positions 0 .. n - 1, and the rotation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from trol.family.generation import BY_LENGTH, RowRotaryEmbedding
from trol.family.published.configs import ConfigReader, internlm2_rope, phi3_rope

from .report import Report

if TYPE_CHECKING:
    from .units import Units

KIND = re.compile(r"\.([a-z]+)([\d.]*)\.\w+$")
FACTORS = ("short_factor", "long_factor")
STATELESS = "own: no call before it matters"


def cos_and_sin(config: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """As trol's decoders have it: by row where the length matters. Shape: [B, T, d] each."""
    by_row = config.rope_parameters["rope_type"] in BY_LENGTH
    rope = RowRotaryEmbedding(config) if by_row else LlamaRotaryEmbedding(config)
    return rope(torch.zeros(1), positions)


def check_internlm2(units: Units, report: Report) -> None:
    """default, linear and dynamic (NTK); upstream's dynamic base remembers the longest call."""
    table = units.tables["rope.internlm2"]
    report.tick("rope.internlm2")
    for group in units.groups("rope.internlm2", 2):
        match = KIND.search(group)
        assert match
        scaling = {"type": match[1], "factor": float(match[2] or 1)}
        reader = ConfigReader({"rope_theta": table["base"], "rope_scaling": scaling}, "units.json")
        config = LlamaConfig(
            head_dim=table["dim"],
            max_position_embeddings=table["max_position_embeddings"],
            rope_parameters=internlm2_rope(reader),
        )
        want, note = units.part(group), ""
        count = want["cos"].shape[0]
        if match[1] == "dynamic" and "_after_" in group:
            want, note = _stateless(units, group, count), STATELESS
        for name, got in zip(
            ("cos", "sin"), cos_and_sin(config, torch.arange(count)[None]), strict=True
        ):
            report.close(f"{group}.{name}", got[0], want[name], note=note)


def _stateless(units: Units, group: str, count: int) -> dict[str, Tensor]:
    """The numbers of a call of the same length that no longer one came before."""
    others = units.groups(group.rpartition(".")[0])
    same = (units.part(other) for other in others if "_after_" not in other)
    return next(part for part in same if part["cos"].shape[0] == count)


def check_phi3(units: Units, report: Report) -> None:
    """default, su and yarn: short factors up to the original length, long ones beyond."""
    table = units.tables["rope.phi3"]
    report.tick("rope.phi3")
    for group in units.groups("rope.phi3", 2):
        kind = group.split(".")[2]
        want = units.part(group)
        got = cos_and_sin(_phi3(table, kind), torch.arange(want["cos"].shape[1])[None])
        for name, tensor in zip(("cos", "sin"), got, strict=True):
            report.close(f"{group}.{name}", tensor, want[name])


def _phi3(table: dict[str, Any], kind: str) -> Phi3Config:
    scaling = {"type": kind, **{name: table[name] for name in FACTORS}}
    values = {**table, "rope_theta": table["base"], "rope_scaling": scaling}
    return Phi3Config(
        hidden_size=table["dim"],
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=table["max_position_embeddings"],
        original_max_position_embeddings=table["original_max_position_embeddings"],
        rope_parameters=phi3_rope(ConfigReader(values, "units.json")),
    )


def check_apply(units: Units, report: Report) -> None:
    """The rotation: half-split, not interleaved."""
    part, table = units.part("rope.apply"), units.tables["rope.internlm2"]
    config = LlamaConfig(
        head_dim=part["q"].shape[-1],
        rope_parameters={"rope_type": "default", "rope_theta": table["base"]},
    )
    turned = apply_rotary_pos_emb(part["q"], part["k"], *cos_and_sin(config, part["position_ids"]))
    for name, got in zip(("q_out", "k_out"), turned, strict=True):
        report.close(f"rope.apply.{name}", got, part[name])
    for name in ("q", "k", "position_ids"):
        report.tick(f"rope.apply.{name}")
