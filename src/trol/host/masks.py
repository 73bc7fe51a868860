"""Masks as attentions take them: boolean, added to scores, or none at all; keys hidden in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trol.errors import HostError

TAKE_NO_HOLES = {
    "flash": "takes masks of padding alone",
    "flex": "compiles its mask anew for each form that the holes have",
}
"""Attentions, by a part of their names, that cannot be told which keys are holes, and why."""


def hiding(
    mask: Any,
    hidden: Tensor,
    earlier: Tensor,
    *,
    attention: str | None,
    causal: bool,
    dtype: torch.dtype,
) -> Any:
    """The mask in the form that it had, or that its attention takes, which hides more keys.

    Args:
        mask: the mask of a layer, or None.
        hidden: what else is not seen. Shape: [B, 1, T, S].
        earlier: which keys come no later than a query. Shape: [T, S].
        attention: eager, sdpa, flex_attention, ...
        causal: whether this attention sees no later keys where it is given no mask.
        dtype: of masks that are added.

    Raises:
        HostError: this attention cannot be told.
    """
    for name, why in TAKE_NO_HOLES.items():
        if name in str(attention):
            raise _refusal(f"{attention} {why}")
    if mask is None and attention not in ("eager", "sdpa"):
        raise _refusal(f"{attention} was given no mask, so it is not known what it sees")
    if mask is None:
        # sdpa then goes by causal, eager hides nothing: whoever wants it to gives it a mask.
        all_seen = attention == "eager" or not causal
        mask = (torch.ones_like(earlier) if all_seen else earlier)[None, None]
        if attention == "eager":  # which adds it
            mask = torch.zeros_like(mask, dtype=dtype)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        what = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise _refusal(f"holes need a mask of 4 dimensions, {attention} takes {what}")
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def is_causal(layer: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a layer's attention sees no later keys by itself: as it is told, or says."""
    told = arguments.get("is_causal")
    own = (one.is_causal for one in layer.modules() if hasattr(one, "is_causal"))
    return bool(next(own, True) if told is None else told)


def _refusal(why: str) -> HostError:
    return HostError(
        f"holes cannot be hidden: {why}; load the model with "
        'attn_implementation="sdpa" or "eager", or set skipped_kv="project".'
    )
