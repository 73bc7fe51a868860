"""What trol makes of a model: its shape, its cache, what a visit costs, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from trol.depth.attachment import attached, check_by_probe, cost_of, depth, is_attached
from trol.depth.policy import to_settings
from trol.depth.trace import StackCost
from trol.errors import HostError
from trol.host.cache import new_cache
from trol.host.layers import FamilyNote, attention_of, family_note, find_decoder, layer_list

PLAIN = "all"
"""The plan under which a model is what it was."""


def describe(model: nn.Module) -> dict[str, Any]:
    """Family, sizes, kinds of cache layers, policy, FLOPs of a visit, and what is refused and why.

    A model that cannot be attached to is described as well; `refused` then says so. JSON values.
    """
    config: Any = model.config
    told: dict[str, Any] = {
        "class": type(model).__name__,
        "family": config.get_text_config(decoder=True).model_type,
        **dict.fromkeys(("layers", "hidden_size", "attention", "cache_layers", "visit")),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "policy": to_settings(attached(model)[1].depth_policy) if is_attached(model) else None,
    }
    try:
        stack: Any = find_decoder(model)
    except HostError as error:
        return told | {"refused": {"any policy": str(error)}}
    layers = list(layer_list(stack) or ())
    told |= {
        "layers": len(layers),
        "hidden_size": stack.config.hidden_size,
        "attention": attention_of(stack.config),
    }
    try:
        told["cache_layers"] = dict(
            Counter(type(one).__name__ for one in new_cache(stack.config).layers)
        )
        with depth(model, PLAIN):
            check_by_probe(model)
            told["visit"] = _visit(cost_of(model))
            return told | {"refused": _refused(stack, family_note(stack))}
    except HostError as error:
        return told | {"refused": {"any policy": str(error)}}


def _visit(cost: StackCost) -> dict[str, Any]:
    """FLOPs of one visit of a layer, from the cheapest to the dearest; None: not known."""
    known = [layer for layer in cost.layers if layer is not None]
    if len(known) < len(cost.layers):
        return {"flops_per_token": None, "flops_per_token_and_key": None}
    return {
        "flops_per_token": sorted({layer.per_token for layer in known}),
        "flops_per_token_and_key": sorted({layer.per_key for layer in known}),
    }


def _refused(stack: Any, quirk: FamilyNote) -> dict[str, str]:
    """What is refused on a model that is not refused as a whole -> why."""
    recurrent = "a recurrent state has no positions to leave out, nor to take back"
    reasons = {
        "second visits": quirk.no_second_visit,
        "skipped_kv='hole'": quirk.no_holes or recurrent * stack.depth_recurrent,
        "speculation": recurrent * stack.depth_recurrent,
        "reading predictions (early exit)": stack.depth_unreadable,
        "some tokens alone": stack.depth_entangled,
    }
    return {what: why for what, why in reasons.items() if why}
