"""Whose a conversion's folder is: one's own to go on with, finished, or somebody else's."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from trol.errors import UsageError
from trol.family.published import shards
from trol.family.published.files import CONFIG, GATING, MARKER, Checkpoint

FINISHED = "conversion.json"
"""What `MARKER` is called when the conversion is finished."""


def manifest(checkpoint: Checkpoint, dtype: torch.dtype, shard_bytes: int) -> dict[str, Any]:
    """What tells conversions apart: all that the shards depend on, and nothing else.

    A tokenizer may be mended meanwhile; weights of the same size are compared value by value.
    """
    gating = checkpoint.folder / GATING
    files = [*checkpoint.files(), *([gating] if gating.is_file() else [])]
    return {
        "sizes": {file.name: file.stat().st_size for file in files},
        "config": sha256((checkpoint.folder / CONFIG).read_bytes()).hexdigest(),
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
    }


def check_destination(destination: str | Path) -> None:
    """`UsageError` for a place where no conversion can go, whatever its source."""
    folder = Path(destination)
    if not str(destination).strip():
        raise UsageError("the destination is empty; give the name of a new folder.")
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; give the name of a new folder.")
        ours = any((folder / name).is_file() for name in (MARKER, FINISHED))
        if not ours and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; give a new folder, or empty this one.")
    except OSError as error:
        raise _no_place(folder, error) from error


def check_apart(source: Path, folder: Path) -> None:
    """`UsageError` for a destination within its source."""
    inner, outer = folder.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise UsageError(
            f"{folder} lies within {source}, which is only read; give a folder elsewhere."
        )


def claim(folder: Path, made_of: dict[str, Any]) -> None:
    """Makes the folder ours; `UsageError` where another conversion has it, or this one is done."""
    if (folder / FINISHED).is_file() and (folder / CONFIG).is_file():
        if _read(folder / FINISHED) == made_of:
            raise UsageError(
                f"{folder} is already there and finished, made of these same files with the same "
                f"settings; there is nothing to do. Next: trol chat {folder}"
            )
        raise UsageError(
            f"{folder} holds a finished conversion of other files, or with other settings; give a "
            "new folder, or empty this one."
        )
    if (folder / MARKER).is_file():
        if _read(folder / MARKER) != made_of:
            raise UsageError(
                f"{folder} holds an unfinished conversion of other files, or with other settings, "
                "than these; go on with those, or empty the folder."
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards.write_json(folder / MARKER, made_of)
    except OSError as error:
        raise _no_place(folder, error) from error


def finish(folder: Path) -> None:
    """Says that the conversion is finished; call it when everything is written and compared."""
    (folder / MARKER).replace(folder / FINISHED)


def _read(file: Path) -> Any:
    """What such a file says; None where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _no_place(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{folder} cannot be made or written to ({error.strerror or error}); give a folder in a "
        "place that exists and where you may write."
    )
