"""Sets of question and answer pairs by name: built in, or a published set in a local file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from trol.data.docstrings import docstring_pairs
from trol.data.pair import SPLITS, Pair, check_split, drawn, shortened
from trol.data.sources.pair_files import FORMATS, check_there, read_pairs
from trol.errors import UsageError, unknown

__all__ = ["NAMES", "SPLITS", "Pair", "check_set", "is_pairs", "pairs_of", "shortened"]

NAMES = ("docstrings", *(f"{form}:FILE" for form in FORMATS))
"""How sets of pairs are named."""


def is_pairs(name: str) -> bool:
    """Whether the name is a set of pairs; a file of it is looked for only by `pairs_of`."""
    form, colon, _ = name.partition(":")
    return name == "docstrings" or (bool(colon) and form in FORMATS)


def pairs_of(name: str, split: str, *, limit: int | None = None, seed: int = 0) -> list[Pair]:
    """The pairs of a split of `docstrings`, `alpaca:FILE`, `cnn_dailymail:FILE` or `samsum:FILE`.

    Which pairs a split has is fixed; the seed gives their order, of which the first `limit` are
    taken.

    Raises:
        UsageError: no such set or split.
        DataError: the file is missing or damaged as a whole.
    """
    check_split(split)
    if not is_pairs(name):
        raise unknown("set of pairs", name, NAMES)
    if name == "docstrings":
        return docstring_pairs(split, limit=limit, seed=seed)
    form, path = _file_of(name)
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return drawn(_read(form, path, split, changed), limit, seed)


def check_set(name: str) -> None:
    """Raises where the set of pairs is to be read from a file, and none is named or there."""
    if name != "docstrings":
        form, path = _file_of(name)
        check_there(form, path)


def _file_of(name: str) -> tuple[str, Path]:
    form, _, file = name.partition(":")
    if not file:
        raise UsageError(f"{name!r} names no file; write {form}:FILE.")
    return form, Path(file)


@lru_cache(maxsize=8)
def _read(form: str, path: Path, split: str, changed: int) -> tuple[Pair, ...]:
    del changed  # a file that was written anew is read anew
    return tuple(read_pairs(form, path, split))
