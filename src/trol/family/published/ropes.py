"""Rotary position embeddings: what the published checkpoints state, in transformers' words."""

from __future__ import annotations

import math
from typing import Any

from trol.errors import DataError
from trol.family.published.files import CURE
from trol.family.published.stated import Stated


def internlm2_rope(stated: Stated) -> dict[str, Any]:
    """InternLM2's RoPE: plain, linear, or dynamic (NTK); `DataError` for another kind."""
    scaling = stated.part("rope_scaling")
    kind = scaling.get("type", "rope_type", default="default")
    if kind not in ("default", "dynamic", "linear"):
        raise DataError(
            f"{stated.place} asks for RoPE scaling {kind!r}, but InternLM2 knows dynamic and "
            f"linear; {CURE}."
        )
    made = {"rope_type": kind, "rope_theta": stated.get("rope_theta", default=10000.0)}
    return made if kind == "default" else made | {"factor": scaling.need("factor")}


def phi3_rope(stated: Stated, head_size: int | None = None) -> dict[str, Any]:
    """Phi-3's RoPE: "su" is transformers' longrope, and "yarn" is it with another factor.

    cos and sin are scaled by √(1 + ln s / ln original), or for "yarn" by 0.1 ln s + 1, where
    s = longest / original. `DataError` for another kind, and for other than head_size / 2 factors
    where the size of a head is given.
    """
    scaling = stated.part("rope_scaling")
    kind = scaling.get("type", "rope_type", default="default")
    made = {"rope_type": "default", "rope_theta": stated.get("rope_theta", default=10000.0)}
    if kind == "default":
        return made
    if kind not in ("su", "longrope", "yarn"):
        raise DataError(
            f"{stated.place} asks for RoPE scaling {kind!r}, but Phi-3 knows su, longrope and "
            f"yarn; {CURE}."
        )
    original = stated.need("original_max_position_embeddings")
    scale = stated.need("max_position_embeddings") / original
    if kind == "yarn":
        made["attention_factor"] = 0.1 * math.log(scale) + 1 if scale > 1 else 1.0
    made |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "factor": scale,
    }
    factors = {name: scaling.need(name) for name in ("short_factor", "long_factor")}
    for name, found in factors.items():
        if head_size is not None and len(found) != head_size // 2:
            raise DataError(
                f"{scaling.place} states {len(found)} numbers as {name}, expected "
                f"{head_size // 2}, half the size of a head; {CURE}."
            )
    return made | factors
