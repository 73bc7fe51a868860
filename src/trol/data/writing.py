"""Writing files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_folder() -> Path:
    """Where trol keeps what it can make again: $XDG_CACHE_HOME/trol, or ~/.cache/trol."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trol"


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Generator[IO[Any]]:
    """A file that becomes `path` when it is complete; nothing stays if writing it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its own name per process: several may write the same file at once.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
