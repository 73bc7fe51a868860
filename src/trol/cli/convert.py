"""`trol convert`: a published checkpoint into a plain TroL folder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trol.cli import terminal
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
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A published checkpoint: folder or hub name.")
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="The folder to make, or to go on with.")
    ],
    *,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help=f"{', '.join(DTYPES)}; else as published."),
    ] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Make a TroL folder of a published checkpoint."""
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    import torch

    from trol.family.published import conversion
    from trol.family.published.files import MARKER

    terminal.no_library_bars()
    with terminal.noise_to_stderr(), _interruption_explained(Path(destination) / MARKER):
        made = conversion.convert(
            source,
            destination,
            dtype=None if dtype is None else getattr(torch, dtype),
            progress=lambda doing, number, of: terminal.note(f"{doing} {number}/{of}"),
        )
    terminal.report(asdict(made), as_json=as_json, text=lambda: _text(made))


@contextmanager
def _interruption_explained(marker: Path) -> Generator[None]:
    """Says what Ctrl-C leaves; `marker` lies in the destination once something is in it."""
    try:
        yield
    except KeyboardInterrupt:
        if marker.is_file():
            terminal.note(
                f"trol: interrupted; the weight files that {marker.parent} has are kept, and the "
                "same command goes on from there."
            )
        else:
            terminal.note("trol: interrupted before anything was written.")
        raise


def _text(made: Converted) -> str:
    files = f"{made.files} file{'' if made.files == 1 else 's'}"
    kept = f", {made.kept} kept from before" if made.kept else ""
    return (
        f"{made.destination}: {made.parameters / 1e6:.1f} M parameters in {made.tensors} tensors, "
        f"{made.bytes / 1e9:.2f} GB of {made.dtype} in {files}{kept}; gates "
        f"{made.sharing}; opened anew and equal to {made.source} in every bit.\n"
        f'Next: trol chat {made.destination} --image PICTURE --question "..."'
    )
