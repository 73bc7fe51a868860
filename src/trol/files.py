"""Result files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trol.errors import unwritable


def folder(path: str | Path) -> Path:
    """The folder `path`, made if it is missing."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write `content` beside `path` and move it there, so that no reader ever sees half a file."""
    data = content.encode() if isinstance(content, str) else content
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write `content` as JSON, keys in their own order; a NaN is an error, not a file."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return write_whole(path, text + "\n")
