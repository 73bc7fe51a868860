"""A mixture as a torch dataset of token rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from trol.data.chat import Row, encode
from trol.data.mixture import Mixture


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
