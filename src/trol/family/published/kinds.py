"""What the values in a checkpoint's `config.json` must be: kinds of values, by their keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.activations import ACT2FN


class Kind(NamedTuple):
    """A kind of value, in words for errors, and whether a value is of it."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(map(_is_id, value)))


def _is_factors(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(one) and one > 0 for one in value)


COUNT = Kind("a whole number above 0", lambda value: _is_id(value) and value > 0)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
ID = Kind("a whole number from 0", _is_id)
IDS = Kind("a whole number from 0, or a list of them", _is_ids)
FACTORS = Kind("a list of numbers above 0", _is_factors)
ACTIVATION = Kind(
    "an activation that transformers knows, such as 'silu'",
    lambda value: isinstance(value, str) and value in ACT2FN,
)

KINDS = {
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), COUNT),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window"), COUNT),
    **dict.fromkeys(("img_size", "image_size", "force_image_size"), COUNT),
    **dict.fromkeys(("rope_theta", "factor", "rms_norm_eps", "layer_norm_eps"), POSITIVE),
    **dict.fromkeys(("initializer_range", "lora_alpha", "downsample_ratio"), POSITIVE),
    **dict.fromkeys(("lora_dropout", "attention_dropout", "embd_pdrop", "resid_pdrop"), SHARE),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ID),
    **dict.fromkeys(("image_token_index", "img_context_token_id"), ID),
    **dict.fromkeys(("short_factor", "long_factor"), FACTORS),
    "eos_token_id": IDS,
    "hidden_act": ACTIVATION,
}
"""By key; what has none here is compared with the tensors, or checked where it is read."""
