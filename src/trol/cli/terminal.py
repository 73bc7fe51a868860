"""What all verbs share: options, results on stdout, messages on stderr, and the `run` record.

Verbs import torch, transformers and the rooms that need them inside their functions, so that
`trol --help` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.progress import Shown

DEFAULT_MODEL = "trol-tiny"
SCOPES = ("answer", "all")
"""Whose tokens may skip, where answers are measured: those of answers, or all."""


def option(name: str, metavar: str, text: str, *aliases: str, **limits: Any) -> Any:
    """The option `name` (or one of `aliases`) with a value, which `text` explains in the help."""
    return typer.Option(name, *aliases, metavar=metavar, help=text, **limits)


def flag(name: str, text: str) -> Any:
    """The option `name` without a value."""
    return typer.Option(name, help=text)


def argument(metavar: str, text: str) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=text)


MODEL_IS = "A name (smollm2, trol-tiny), a folder, a GGUF file or a hub name."
Model = Annotated[str, argument("MODEL", MODEL_IS)]
AsJson = Annotated[bool, flag("--json", "Print one JSON object and nothing else.")]
ChatTemplate = Annotated[
    str | None,
    option(
        "--chat-template",
        "FILE_OR_TEXT",
        "A Jinja template for MODEL, in place of its own or where it has none.",
    ),
]
Depth = Annotated[
    str | None,
    option("--depth", "PLAN", 'A plan ("0-3:2 4-7"), its file, a calibrated exit, a policy.'),
]
MaxNewTokens = Annotated[int, option("--max-new-tokens", "N", "Longest answer, in tokens.", min=1)]
Out = Annotated[Path, option("--out", "DIR", "Folder for the results.")]
Overrides = Annotated[
    list[str] | None, argument("[KEY=VALUE]...", "Settings that replace the recipe's.")
]
Questions = Annotated[int, option("--questions", "N", "How many questions are asked.", min=1)]
Seed = Annotated[int, option("--seed", "N", "Where randomness starts.")]
SHARD_HELP = "Do part I, from 0, of N parts. Default: by torchrun, or all."
Shard = Annotated[str | None, option("--shard", "I/N", SHARD_HELP)]
Task = Annotated[
    str | None,
    option(
        "--task",
        "NAME",
        "The questions: text:FILE, chat:FILE, alpaca:FILE, ... Default: boards for a model that "
        "sees, else docstrings.",
    ),
]


def may_be_offline(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with one option more, `--offline`, with which nothing is fetched."""

    @functools.wraps(verb)
    def called(*, offline: bool, **given: Any) -> Any:
        if offline:  # before huggingface_hub is imported, which reads it once
            os.environ["HF_HUB_OFFLINE"] = "1"
        return verb(**given)

    kind = Annotated[bool, flag("--offline", "Fetch nothing: open what is on this machine.")]
    option = inspect.Parameter("offline", inspect.Parameter.KEYWORD_ONLY, annotation=kind)
    own = inspect.signature(verb, eval_str=True)
    parameters = [*own.parameters.values(), option.replace(default=False)]
    called.__signature__ = own.replace(parameters=parameters)  # pyright: ignore
    return called


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trol {_version('trol-vlm')}")
        raise typer.Exit


def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show trol's version."
        ),
    ] = False,
) -> None:
    """Let tokens visit a layer again, or not at all."""
    del version  # its callback has left


def listed(names: str) -> list[str]:
    r"""The names of a text with commas between them, each once; `\,` is a comma in a name.

    Raises:
        UsageError: names with a comma between them are the name of one file.
    """
    parts = re.split(r"(?<!\\),", names)
    runs = combinations(range(len(parts) + 1), 2)
    for first, last in sorted(runs, key=lambda run: run[0] - run[1]):  # the longest first
        name = ",".join(parts[first:last]).strip()
        if last > first + 1 and os.path.exists(name.partition(":")[2] or name):
            written = name.replace(",", "\\,")
            raise UsageError(f"commas divide names; write one in a name as in '{written}'.")
    bare = (part.strip().replace("\\,", ",") for part in parts)
    return list(dict.fromkeys(name for name in bare if name))


@contextlib.contextmanager
def short_warnings() -> Generator[None]:
    """While open, a warning is one line, without the place in the source that it comes from."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if not issubclass(category, (FutureWarning, DeprecationWarning)):  # for developers
            note(f"trol: {message}")

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def noise_to_stderr() -> Generator[None]:
    """While open, what libraries print goes to stderr: stdout is for results.

    Warnings are short.
    """
    with short_warnings(), contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def quiet_libraries() -> Generator[None]:
    """As `noise_to_stderr`, and transformers shows no progress bars of its own."""
    from transformers import logging

    logging.disable_progress_bar()
    with noise_to_stderr():
        yield


@contextlib.contextmanager
def on_interrupt(hint: Callable[[], str]) -> Generator[None]:
    """While open, Ctrl-C says what it leaves and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        note(hint())
        raise


def report(result: Mapping[str, Any], *, as_json: bool, text: Callable[[], str]) -> None:
    """Print `result` as one JSON object, or as `text` for people."""
    print(json.dumps(result, ensure_ascii=False) if as_json else text(), flush=True)


def note(line: str) -> None:
    """Print progress or a hint on stderr, where no pipe reads it."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(name: str, unit: str = "") -> Generator[Shown]:
    """While open, a bar on stderr; call it with `(done, of)`."""
    from trol.progress import Shown

    bar = Shown(name, unit)
    try:
        yield bar
    finally:
        bar.close()


def table(rows: list[list[str]]) -> str:
    """`rows` (the first is the heading) in aligned columns, numbers to the right.

    A row may have fewer cells than the heading.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")


def run_record(seed: int | None = None) -> dict[str, Any]:
    """The `run` entry of every result file."""
    return {
        "command": shlex.join(["trol", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "seed": seed,
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """trol's own version, Python's, and those of the packages that results depend on."""
    own = {"trol": _version("trol-vlm"), "python": platform.python_version()}
    return own | {name: _version(name) for name in PACKAGES}


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
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """Processor kind and the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores"
