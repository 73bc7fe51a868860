"""A transformers configuration for other layers than its own: fewer, or some of them twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from trol.host.layers import attention_of, with_attention

INDEX_LISTS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "mlp_only_layers",
    "moe_layers",
)
"""Entries that list the numbers of the layers of one kind."""

FIRSTS = ("first_k_dense_replace", "max_window_layers")
"""Entries that say how many of the first layers are of one kind."""

PER_LAYER = ("layer", "_types")
"""What the names of entries contain that have one value for each layer."""


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a model's configuration whose decoder has the layers `kept`, in this order.

    What has one value for each layer, lists layer numbers or counts the first layers of a kind is
    cut to match. Rules by which a family derives a layer's kind from its number stay as they are:
    `trol.policies.export` finds where they then say something else.
    """
    text = config.get_text_config(decoder=True)
    cut = with_attention(type(text).from_dict(_cut(text, kept)), attention_of(text))
    return _replaced(config, text, cut)


def _cut(text: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    layers = text.num_hidden_layers
    entries = text.to_dict()
    for name, value in entries.items():
        if name in INDEX_LISTS and value is not None:
            entries[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in FIRSTS and value is not None:
            entries[name] = sum(old < value for old in kept)
        elif isinstance(value, (list, tuple)) and _is_per_layer(name, value, layers):
            entries[name] = [value[old] for old in kept]
    count = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return entries | {count: len(kept)}


def _is_per_layer(name: str, value: Sequence[Any], layers: int) -> bool:
    return len(value) == layers and any(part in name for part in PER_LAYER)


def _replaced(config: Any, old: Any, new: Any) -> Any:
    """A copy of `config` in which `new` stands where `old` stood."""
    if config is old:
        return new
    made = copy.deepcopy(config)
    for name in config.sub_configs:
        inner = getattr(config, name)
        if isinstance(inner, PreTrainedConfig):
            setattr(made, name, _replaced(inner, old, new))
    return made
