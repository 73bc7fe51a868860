"""What verbs share: their common arguments, and one way to print results.

Where a result came from: command, commit, versions, machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trol.training.progress import Shown


DEFAULT_MODEL = "trol-tiny"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A name, a folder or a hub name.")]
Depth = Annotated[
    str | None,
    typer.Option("--depth", metavar="PLAN", help='A plan such as "0-3:2 4-7", or a plan file.'),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Where randomness starts.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE_OR_TEXT",
        help="A Jinja template for MODEL, in place of its own or where it has none.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
]


@contextlib.contextmanager
def noise_to_stderr() -> Generator[None]:
    """While open, whatever libraries print goes to stderr: stdout is for results.

    Warnings are shown as one line each, without the place in the source that they come from.
    """

    def shown(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if not issubclass(category, (FutureWarning, DeprecationWarning)):  # for developers
            note(f"trol: {message}")

    before = warnings.showwarning
    warnings.showwarning = shown
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        warnings.showwarning = before


def no_library_bars() -> None:
    """Silences transformers' own progress bars: a model of a verb opens in a moment."""
    from transformers import logging

    logging.disable_progress_bar()


def report(result: Mapping[str, Any], *, as_json: bool, text: Callable[[], str]) -> None:
    """Print `result` as one JSON object, or as `text` for people."""
    print(json.dumps(result, ensure_ascii=False) if as_json else text(), flush=True)


def note(line: str) -> None:
    """Tell the person, not the pipe: progress and hints go to stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(name: str, unit: str = "") -> Generator[Shown]:
    """While open, shows on stderr how far something is; see `trol.training.progress.Shown`."""
    from trol.training.progress import Shown

    shown = Shown(name, unit)
    try:
        yield shown
    finally:
        shown.close()


def table(rows: list[list[str]]) -> str:
    """`rows` (the first is the heading) in aligned columns, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")


def run_record(seed: int | None = None) -> dict[str, Any]:
    """The `run` entry that every result file carries."""
    return {
        "command": shlex.join(["trol", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "seed": seed,
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """trol's own version, Python's, and those of the packages that results depend on."""
    found = {"trol": _version("trol-vlm"), "python": platform.python_version()}
    return found | {name: _version(name) for name in PACKAGES}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """The checkout's commit, with + if files were changed since; None outside a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def machine() -> str:
    """Processor kind and the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores"
