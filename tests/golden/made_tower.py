"""A small InternViT written out, for tests of the check that opens one from published weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .bicubic import enlarged_table

SIZES = {"hidden_size": 12, "intermediate_size": 8, "layers": 2, "heads": 3}
SIZES |= {"image_size": 8, "patch_size": 4}
TABLE = SIZES | {"eps": 1e-6}
PICTURES = {"same": (8, 8), "other_size": (12, 4)}
"""Their height and width."""


def internvit() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Towers with RMS norms, also of queries and keys, and with LayerNorms and biases."""
    tensors = {}
    for kind in ("rms_qknorm", "layernorm"):
        weights = _weights(biased=kind == "layernorm")
        tensors |= {f"internvit.{kind}.w.{name}": made for name, made in weights.items()}
        for name, shape in PICTURES.items():
            pixels, group = torch.randn(2, 3, *shape), f"internvit.{kind}.{name}"
            tensors[f"{group}.pixel_values"] = pixels
            tensors[f"{group}.last_hidden_state"] = _tower(weights, pixels)
    return tensors, {"internvit": TABLE}


def _weights(*, biased: bool) -> dict[str, Tensor]:
    size, inner, patch = (SIZES[f"{n}_size"] for n in ("hidden", "intermediate", "patch"))
    positions = 1 + (SIZES["image_size"] // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, size),
        "embeddings.position_embedding": (1, positions, size),
        "embeddings.patch_embedding.weight": (size, 3, patch, patch),
        "embeddings.patch_embedding.bias": (size,),
    }
    own = {"norm1.bias": size, "norm2.bias": size, "attn.qkv.bias": 3 * size}
    own = own if biased else {"attn.q_norm.weight": size, "attn.k_norm.weight": size}
    own |= dict.fromkeys(("ls1", "ls2", "norm1.weight", "norm2.weight"), size)
    linears = {"attn.proj": (size, size), "mlp.fc1": (inner, size), "mlp.fc2": (size, inner)}
    for layer in (f"encoder.layers.{number}" for number in range(SIZES["layers"])):
        shapes |= {f"{layer}.{name}": (count,) for name, count in own.items()}
        shapes[f"{layer}.attn.qkv.weight"] = (3 * size, size)
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in linears.items()}
    return {name: torch.randn(shape) / 2 for name, shape in shapes.items()}


def _tower(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """x + ls1 attention(n1(x)), then x + ls2 mlp(n2(x)), layer by layer. Shape: [N, 1 + P, D]."""
    patch = SIZES["patch_size"]
    grid = [length // patch for length in pixels.shape[-2:]]
    flat = functional.unfold(pixels, patch, stride=patch).mT  # Shape: [N, P, 3 patch²]
    x = _linear(weights, "embeddings.patch_embedding", flat)
    first = weights["embeddings.class_embedding"].expand(len(x), 1, -1)
    table = enlarged_table(weights["embeddings.position_embedding"][0], *grid)
    x = torch.cat([first, x], dim=1) + table
    for number in range(SIZES["layers"]):
        prefix = f"encoder.layers.{number}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        x = x + own["ls1"] * _attention(own, _norm(own, "norm1", x))
        inner = _linear(own, "mlp.fc1", _norm(own, "norm2", x))
        x = x + own["ls2"] * _linear(own, "mlp.fc2", inner * (1 + torch.erf(inner / 2**0.5)) / 2)
    return x


def _attention(own: dict[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = _linear(own, "attn.qkv", x).chunk(3, dim=-1)
    if "attn.q_norm.weight" in own:
        q, k = _norm(own, "attn.q_norm", q), _norm(own, "attn.k_norm", k)
    q, k, v = (part.unflatten(-1, (SIZES["heads"], -1)) for part in (q, k, v))
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])
    mixed = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v)
    return _linear(own, "attn.proj", mixed.flatten(-2))


def _norm(own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A LayerNorm where it has a bias; else x / √(mean x² + eps), scaled."""
    bias = own.get(f"{name}.bias")
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + TABLE["eps"]).rsqrt() * own[f"{name}.weight"]
    return x if bias is None else x + bias


def _linear(own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ own[f"{name}.weight"].flatten(1).T + own.get(f"{name}.bias", 0.0)
