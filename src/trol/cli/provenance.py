"""Where a result came from: command, commit, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
