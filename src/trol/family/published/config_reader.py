"""What a checkpoint's `config.json` states, and the image token's id in its tokenizer's files.

What the values in a checkpoint's `config.json` must be: kinds of values, by their keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers.activations import ACT2FN

from trol.errors import DataError
from trol.family.published.files import CURE, read_json


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


IMAGE_TOKEN = "<IMG_CONTEXT>"
"""Phi-3's image token; InternLM2's has the id after its vocabulary, and no name."""


ADDED, DECODER = "added_tokens", "added_tokens_decoder"
"""Keys of the added tokens in tokenizer.json and in tokenizer_config.json."""


class Stated:
    """What `config.json`, or a part of it, states; `place` names it in errors.

    Null counts as not stated. What is stated must be of its key's kind (`KINDS`), or else reading
    it raises `DataError`.
    """

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, dict):
            raise DataError(f"{place} is {values!r}, not an object; {CURE}.")
        self._values, self.place = values, place

    def part(self, name: str) -> Stated:
        """What a part states; nothing where it is left out."""
        return Stated(self.get(name, default={}), f"{self.place}: {name}")

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these that is stated."""
        return next(iter(self.take(*names).values()), default)

    def need(self, name: str) -> Any:
        """What must be stated; `DataError` where it is not."""
        found = self.get(name)
        if found is None:
            raise DataError(f"{self.place} does not state {name!r}; {CURE}.")
        return found

    def agree(self, **found: Any) -> dict[str, Any]:
        """What the tensors tell; `DataError` where it is stated otherwise."""
        for name, value in found.items():
            if self.get(name, default=value) != value:
                raise DataError(
                    f"{self.place} states {name} {self.get(name)!r}, but the tensors are made for "
                    f"{value!r}; {CURE}."
                )
        return found

    def take(self, *names: str) -> dict[str, Any]:
        """Those of these that are stated."""
        found = {name: self._values[name] for name in names if self._values.get(name) is not None}
        for name, value in found.items():
            if name in KINDS and not KINDS[name].holds(value):
                raise DataError(
                    f"{self.place} states {name} {value!r}, expected {KINDS[name].words}; {CURE}."
                )
        return found


def image_token_id(stated: Stated, folder: Path, vocab: int) -> int:
    """The id of `IMAGE_TOKEN`, as stated, or else as the tokenizer's files have it."""
    found = stated.get("image_token_index", "img_context_token_id", default=None)
    if found is None:
        found = added_tokens(folder).get(IMAGE_TOKEN)
    if found is None or not 0 <= found < vocab:
        raise DataError(
            f"the tokenizer in {folder} gives the image token {IMAGE_TOKEN!r} the id {found}, "
            f"expected one of the {vocab} in the token table; put the checkpoint's own tokenizer "
            "files (tokenizer.json, added_tokens.json, tokenizer_config.json) beside its weights."
        )
    return found


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beyond the trained vocabulary, from whichever of the tokenizer's files has them."""
    tokens: dict[str, int] = {}
    if (file := folder / "tokenizer.json").is_file():
        tokens |= _listed(file, lambda whole: [(e["content"], e["id"]) for e in whole[ADDED]])
    if (file := folder / "tokenizer_config.json").is_file():
        tokens |= _listed(
            file, lambda whole: [(e["content"], i) for i, e in whole.get(DECODER, {}).items()]
        )
    if (file := folder / "added_tokens.json").is_file():
        tokens |= _listed(file, lambda whole: list(whole.items()))
    return tokens


def _listed(file: Path, pairs: Callable[[dict[str, Any]], list[Any]]) -> dict[str, int]:
    """Tokens and ids from a file of the tokenizer; `DataError` where it lists them otherwise."""
    try:
        return {token: int(number) for token, number in pairs(read_json(file))}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} does not list its added tokens as tokenizers do ({error!r}); {CURE}."
        ) from error


def end_token(folder: Path) -> str | None:
    """The tokenizer's end token, which its settings give as text or with its flags."""
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    stated = read_json(file).get("eos_token")
    return stated.get("content") if isinstance(stated, dict) else stated
