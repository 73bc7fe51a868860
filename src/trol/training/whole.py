"""Folders and files that are on disk whole or not at all, whenever the power goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from trol.training import processes

DRAFTS = ".writing"
"""Beside what is whole: the folder with what is not yet."""


@contextmanager
def whole_folder(place: Path) -> Generator[Path]:
    """A folder to write into, which becomes `place` when the block ends; all processes take part.

    What is written is on the disk before it gets its name. After an error nothing of it is left,
    and an earlier folder of that name is as it was.
    """
    draft = place.parent / DRAFTS / place.name
    if processes.is_first():
        shutil.rmtree(draft.parent, ignore_errors=True)
        draft.mkdir(parents=True)
    processes.wait()
    try:
        yield draft
        processes.wait()
        if processes.is_first():
            _sync_tree(draft)
            _put(draft, place)
    except BaseException:
        if processes.is_first():
            shutil.rmtree(draft.parent, ignore_errors=True)
        raise
    processes.wait()


def write_whole(path: Path, text: str) -> None:
    """Writes `text` beside `path` and moves it there."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)


def _put(draft: Path, place: Path) -> None:
    """Gives the draft its name; the folder that had it is removed afterwards."""
    old = draft.with_name(f"{place.name}.old")
    if place.exists():
        place.replace(old)
    draft.replace(place)
    _sync(place.parent)
    shutil.rmtree(draft.parent)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
