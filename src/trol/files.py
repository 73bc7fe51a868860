"""Files and folders that are on disk whole or not at all, whenever the power goes.

Both are written under another name beside their place, flushed to the disk, and then renamed.
After an error the draft is gone, and what had the name before is as it was.
"""

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trol.errors import unwritable


def cache_folder() -> Path:
    """Where trol keeps what it can make or fetch again: $XDG_CACHE_HOME/trol, or ~/.cache/trol."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trol"


def folder(path: str | Path) -> Path:
    """The folder `path`, made if it is missing."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """The name of a draft to write, which becomes the file `path` when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each process: several may write the same file at once.
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def whole_folder(
    place: Path,
    *,
    draft: Path | None = None,
    first: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Generator[Path]:
    """An empty folder to fill, which replaces the folder `place` when the block ends.

    Args:
        place: where the folder belongs.
        draft: where it is filled, on the same disk; by default beside `place`.
        first: whether this process is the one that makes and renames folders, of several that
            fill one together.
        wait: returns once all these processes have called it.
    """
    draft = draft or place.with_name(f".{place.name}.draft")
    old = draft.with_name(f"{draft.name}.old")
    if first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    wait()
    try:
        yield draft
        wait()
        if first:
            for path in [*draft.rglob("*"), draft]:
                _sync(path)
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)  # of a run that was killed while removing it
                place.replace(old)
            draft.replace(place)
            _sync(place.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if first:
            if old.exists() and not place.exists():
                old.replace(place)
            shutil.rmtree(draft, ignore_errors=True)
        raise
    wait()


def write_whole(path: Path, content: str | bytes) -> Path:
    """Writes `content`, text as UTF-8, and gives back the path."""
    with whole_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes `content` as JSON, keys in their own order; a NaN is an error, not a file."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return write_whole(path, text + "\n")


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
