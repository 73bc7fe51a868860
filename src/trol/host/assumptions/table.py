"""The form of the table: what is assumed, who uses it, and how it is looked up.

The smallest real model, on which what is assumed is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

Found = Callable[[], str | None]
"""None where the assumption holds; else what was found instead."""


@dataclass(frozen=True)
class Assumption:
    """One thing that trol takes for granted of another library."""

    name: str
    """A sentence that can be true or false."""
    used_by: str
    """The files that would be wrong without it, and how."""
    look: Found
    at_attach: bool
    """Whether it takes so little to look that every first `trol.attach` of a process does."""

    def found(self) -> str | None:
        """None where it holds; else what was found instead, an error of the look included."""
        try:
            return self.look()
        except Exception as error:
            return f"{type(error).__name__}: {error}"


class Table:
    """Rows in the order in which they are written down."""

    def __init__(self) -> None:
        self.rows: list[Assumption] = []

    def row(self, used_by: str, *, at_attach: bool = False) -> Callable[[Found], Found]:
        """Adds a look; its docstring is the name of the assumption."""

        def add(look: Found) -> Found:
            name = " ".join((look.__doc__ or "").split()).rstrip(".")
            self.rows.append(Assumption(name, used_by, look, at_attach))
            return look

        return add


def differs(what: str, found: object, wanted: object) -> str | None:
    """None where both are equal, else a finding."""
    return None if found == wanted else f"{what} is {found!r}, not {wanted!r}"


SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_config(**settings: Any) -> LlamaConfig:
    """Two layers of eight numbers."""
    return LlamaConfig(**{**SIZES, **settings})


def tiny_model(cls: Any = LlamaForCausalLM, **settings: Any) -> Any:
    """A random Llama of this configuration, in evaluation mode; the caller's seed stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(tiny_config(**settings)).eval()


def ids(tokens: int = 4) -> torch.Tensor:
    """Token ids [1, tokens]."""
    return torch.arange(1, tokens + 1)[None]
