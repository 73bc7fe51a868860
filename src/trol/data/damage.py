"""What can be wrong with one row of training data, by name."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from trol.errors import DataError, unknown

Read = TypeVar("Read")

KINDS = {
    "broken_row": "no readable row: broken JSON, or no keys and values",
    "wrong_format": "other columns, roles or contents than the format has",
    "role_order": "not user and assistant in turn, ending with the assistant",
    "empty_question": "the user says nothing",
    "empty_answer": "the assistant says nothing",
    "image_count": "another number of images than of placeholders",
    "image_missing": "no image file at the path",
    "image_unreadable": "an image that is truncated, damaged, too large or none",
    "image_url": "an address where addresses are not allowed, or that does not answer",
    "too_long": "more tokens than the model has positions",
}
"""Kind of damage -> what it means."""


class RowError(DataError):
    """One row that cannot be trained on; `kind` is one of `KINDS`."""

    def __init__(self, kind: str, message: str) -> None:
        if kind not in KINDS:
            raise unknown("kind of damage", kind, KINDS)
        super().__init__(kind, message)  # both, so that the error can be pickled
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def row_errors(what: str = "it cannot be read") -> Generator[None]:
    """While open, whatever goes wrong is a `RowError`; one that has no kind is a wrong format."""
    try:
        yield
    except (RowError, MemoryError):
        raise
    except DataError as error:
        raise RowError("wrong_format", str(error)) from error
    except Exception as error:  # what a row holds meets templates and processors of many families
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RowError("wrong_format", f"{what}: {told}") from error


def sound(
    path: object,
    rows: Iterable[Mapping[str, Any] | RowError],
    read: Callable[[Mapping[str, Any]], Read],
    what: str,
) -> list[Read]:
    """What `read` makes of the rows that are whole; the others are counted in a warning.

    Raises:
        DataError: not one row is whole; `what` says what they should have been.
    """
    found: list[Read] = []
    damaged: Counter[str] = Counter()
    first = None
    for row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            found.append(read(row))
        except RowError as error:
            damaged[error.kind] += 1
            first = first or error
    if not found:
        raise DataError(f"{path} has no sound row of {what}: {first or 'it is empty.'}")
    if damaged:
        told = ", ".join(f"{count} {kind}" for kind, count in damaged.items())
        warnings.warn(f"rows of {path} left out: {told} (the first: {first})", stacklevel=4)
    return found
