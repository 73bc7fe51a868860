"""`trol convert`: a published checkpoint into a plain TroL folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trol.cli import terminal
from trol.cli.terminal import argument, option
from trol.errors import unknown

if TYPE_CHECKING:
    from trol.family.published.conversion import Converted

EXAMPLES = (
    "trol convert BK-Lee/TroL-1.8B models/trol-1.8b",
    "trol convert downloads/TroL-3.8B models/trol-3.8b --dtype bfloat16",
    "trol convert BK-Lee/TroL-7B models/trol-7b --json > converted.json",
)
DTYPES = ("float16", "bfloat16", "float32")


def convert(
    source: Annotated[str, argument("SOURCE", "A published checkpoint: folder or hub name.")],
    destination: Annotated[str, argument("DEST", "The folder to make, or to go on with.")],
    *,
    dtype: Annotated[
        str | None, option("--dtype", "TYPE", f"{', '.join(DTYPES)}; else as published.")
    ] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Make a TroL folder of a published checkpoint."""
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    import torch

    from trol.family.published import conversion
    from trol.family.published.files import MARKER

    def hint() -> str:
        if not (Path(destination) / MARKER).is_file():
            return "trol: interrupted before anything was written."
        return (
            f"trol: interrupted; the weight files that {Path(destination)} has are kept, and the "
            "same command goes on from there."
        )

    with terminal.quiet_libraries(), terminal.on_interrupt(hint):
        converted = conversion.convert(
            source,
            destination,
            dtype=None if dtype is None else getattr(torch, dtype),
            progress=lambda doing, number, of: terminal.note(f"{doing} {number}/{of}"),
        )
    terminal.report(asdict(converted), as_json=as_json, text=lambda: _text(converted))


def _text(folder: Converted) -> str:
    files = f"{folder.files} file{'' if folder.files == 1 else 's'}"
    kept = f", {folder.kept} kept from before" if folder.kept else ""
    return (
        f"{folder.destination}: {folder.parameters / 1e6:.1f} M parameters in {folder.tensors} "
        f"tensors, {folder.bytes / 1e9:.2f} GB of {folder.dtype} in {files}{kept}; gates "
        f"{folder.sharing}; opened anew and equal to {folder.source} in every bit.\n"
        f'Next: trol chat {folder.destination} --image PICTURE --question "..."'
    )
