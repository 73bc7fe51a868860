"""What a checkpoint's `config.json` states, and the image token's id in its tokenizer's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trol.errors import DataError
from trol.family.published.files import CURE, read_json

IMAGE_TOKEN = "<IMG_CONTEXT>"
"""Phi-3's image token; InternLM2's has the id after its vocabulary, and no name."""


class Stated:
    """What `config.json`, or a part of it, states; `place` names it in errors."""

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, dict):
            raise DataError(f"{place} is {values!r}, not an object; {CURE}.")
        self._values, self.place = values, place

    def part(self, name: str) -> Stated:
        """What a part states; nothing where it is left out."""
        return Stated(self.get(name, default={}), f"{self.place}: {name}")

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these that is stated."""
        found = (self._values[name] for name in names if self._values.get(name) is not None)
        return next(found, default)

    def need(self, name: str) -> Any:
        """What must be stated; `DataError` where it is not."""
        if self._values.get(name) is None:
            raise DataError(f"{self.place} does not state {name!r}; {CURE}.")
        return self._values[name]

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
        return {name: self._values[name] for name in names if self._values.get(name) is not None}


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
        tokens |= {entry["content"]: entry["id"] for entry in read_json(file)["added_tokens"]}
    if (file := folder / "tokenizer_config.json").is_file():
        listed = read_json(file).get("added_tokens_decoder", {})
        tokens |= {entry["content"]: int(number) for number, entry in listed.items()}
    if (file := folder / "added_tokens.json").is_file():
        tokens |= read_json(file)
    return tokens


def end_token(folder: Path) -> str | None:
    """The tokenizer's end token, which its settings give as text or with its flags."""
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    stated = read_json(file).get("eos_token")
    return stated.get("content") if isinstance(stated, dict) else stated
