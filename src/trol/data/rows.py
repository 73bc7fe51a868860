"""Mixtures and pairs as torch datasets, of token rows or of messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset

from trol.data.chat import Row, encode
from trol.data.mixture import Mixture
from trol.data.pair import Pair


@dataclass(frozen=True)
class MixtureRows(Dataset[Row]):
    """Item i is conversation i of the mixture, encoded; nothing is read before it is asked for."""

    mixture: Mixture
    processor: Any
    """A processor, or a tokenizer where no row has pictures."""
    most_tokens: int | None = None
    """Positions that the model has; a longer row is a `RowError`."""

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, number: int) -> Row:
        part, place = self.mixture.place(number)
        with self.mixture.naming(number):
            return encode(self.processor, part.messages(place), most_tokens=self.most_tokens)


@dataclass(frozen=True)
class PairRows(Dataset[Row]):
    """Item i is pair i, encoded; kept once it is made."""

    pairs: Sequence[Pair]
    tokenizer: Any
    most_tokens: int | None = None
    """Positions that the model has; a longer row is a `RowError`."""
    made: dict[int, Row] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> Row:
        if number not in self.made:
            messages = self.pairs[number].messages()
            self.made[number] = encode(self.tokenizer, messages, most_tokens=self.most_tokens)
        return self.made[number]


@dataclass(frozen=True)
class PairMessages(Dataset[list[dict[str, Any]]]):
    """Item i is pair i as messages."""

    pairs: Sequence[Pair]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        return self.pairs[number].messages()
