"""The form of the table: what is assumed, who uses it, and how it is looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
