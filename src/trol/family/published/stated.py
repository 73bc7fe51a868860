"""What a checkpoint's `config.json` states, and the image token's id in its tokenizer's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trol.errors import DataError
from trol.family.published.files import CURE, read_json
from trol.family.published.kinds import KINDS

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
