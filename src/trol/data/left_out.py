"""Training on data with damaged rows: they are named, counted, and replaced by sound ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from trol.data.damage import row_errors
from trol.data.order import order
from trol.errors import DataError

TOLD = 5
"""Rows that are named when they are left out; all of them are counted."""

TRIED = 1000
"""Rows that are tried in the place of one before the data are given up."""


class SoundRows(Dataset[int]):
    """Rows of which only those come into a batch that can be learnt from. Item i is i itself.

    In the place of a damaged row comes another, always the same; so ranks stay in step, and a run
    that is resumed goes on as it would have. Of rows that are sound alone and make no batch
    together the later ones are left out.

    Args:
        rows: a map-style dataset whose rows may be damaged.
        collate: rows to a batch.
        where: file and number of a row, for people.
    """

    def __init__(self, rows: Any, collate: Callable[..., Any], where: Callable[[int], str]) -> None:
        self.rows, self.collate, self.where = rows, collate, where
        self.mixture = getattr(rows, "mixture", None)
        self.left_out: dict[int, str] = {}
        """Number of a row -> file, number and what is wrong, in the order of being met."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> int:
        return number

    def batch(self, numbers: Sequence[int]) -> Any:
        """The batch of these rows.

        Raises:
            DataError: no row can be learnt from.
        """
        try:
            with row_errors():
                return self.collate([self.rows[number] for number in numbers])
        except DataError:
            return self._together([self._sound(number) for number in numbers])

    def _sound(self, number: int) -> int:
        """The row itself, or the first sound one in the order that belongs to it."""
        if self._is_sound([number]):
            return number
        others = order(len(self), seed=0, epoch=number)[:TRIED]
        for other in others:
            if self._is_sound([int(other)]):
                return int(other)
        reasons = list(self.left_out.values())
        raise DataError(
            f"none of the {len(others):,} rows that were tried can be learnt from: "
            f"{' | '.join(reasons[:3])}"
        )

    def _together(self, numbers: Sequence[int]) -> Any:
        kept = [numbers[0]]
        for number in numbers[1:]:
            if self._is_sound([*kept, number]):
                kept.append(number)
        return self.collate([self.rows[number] for number in kept])

    def _is_sound(self, numbers: Sequence[int]) -> bool:
        """Whether these rows make a batch; if not, the last of them is left out."""
        try:
            with row_errors():
                self.collate([self.rows[number] for number in numbers])
        except DataError as error:
            self._leave_out(numbers[-1], str(error))
            return False
        return True

    def _leave_out(self, number: int, why: str) -> None:
        if number in self.left_out:
            return
        where = self.where(number)
        self.left_out[number] = why if why.startswith(where) else f"{where}: {why}"
        if len(self.left_out) <= TOLD:
            more = "; more are counted without a word" if len(self.left_out) == TOLD else ""
            warnings.warn(f"left out {self.left_out[number]}{more}", stacklevel=2)
