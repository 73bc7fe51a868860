"""Damaged rows are named and counted, sound ones take their place, and nothing ends a run."""

import warnings
from typing import Any

import pytest

from trol.data.conversations import NAMED, SoundRows
from trol.errors import DataError

ERRORS = (DataError, ValueError, TypeError, KeyError, IndexError, RuntimeError, UnicodeEncodeError)


class Rows:
    """Numbers, of which some cannot be read."""

    def __init__(self, count: int, unread: Any = ()) -> None:
        self.count, self.unread = count, unread

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        if number in self.unread:
            raise KeyError("what a row held")
        return number


def sound(
    rows: Rows, refused: Any = (), error: type[Exception] = ValueError, lonely: int = -1
) -> SoundRows:
    def collate(items: list[int]) -> list[int]:
        if bad := [item for item in items if item in refused]:
            raise error("utf-8", "?", 0, 1, "odd") if error is UnicodeEncodeError else error(bad[0])
        if lonely in items and len({item % 2 for item in items}) > 1:
            raise DataError(f"{lonely} goes with its like alone")
        return items

    return SoundRows(rows, collate, lambda number: f"chat.jsonl, row {number}")


@pytest.mark.parametrize("error", ERRORS)
def test_another_row_takes_the_place(error: type[Exception]) -> None:
    rows = sound(Rows(20, unread={3}), refused={5}, error=error)
    with pytest.warns(UserWarning, match=r"left out chat\.jsonl, row [35]: "):
        made = rows.batch([2, 3, 4, 5])
    assert made[0::2] == [2, 4]
    assert not {3, 5} & set(made)
    assert set(rows.left_out) == {3, 5}
    assert "what a row held" in rows.left_out[3]
    assert rows.batch([2, 3, 4, 5]) == made, "always the same ones"
    assert sound(Rows(20)).batch([0, 2]) == [0, 2]


def test_what_goes_with_no_other_is_left_out_of_that_batch_alone() -> None:
    rows = sound(Rows(20), lonely=7)
    with pytest.warns(UserWarning, match="row 7: 7 goes with its like alone"):
        assert rows.batch([2, 7, 4]) == [2, 4]
    assert rows.batch([7, 9]) == [7, 9]


def test_some_are_named_and_all_are_counted() -> None:
    rows = sound(Rows(60), refused=range(0, 60, 2))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows.batch(range(60))
    assert len(told) == NAMED
    assert len(rows.left_out) == 30


def test_no_sound_row_is_one_clear_line() -> None:
    rows = sound(Rows(9), refused=range(9))
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"none of the 9 rows .*: chat\.jsonl, row 4: .* \| ") as end,
    ):
        rows.batch([4])
    assert "\n" not in str(end.value)


def test_memory_is_no_fault_of_a_row() -> None:
    with pytest.raises(MemoryError):
        sound(Rows(9), refused={1}, error=MemoryError).batch([1])
