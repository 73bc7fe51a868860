"""Triton, which is never required: whether it is there, and what to do where it fails."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

Kernel = Callable[..., Any]

_FAILED: set[str] = set()
"""Kernels that failed in this process."""


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


def missing(device: torch.device) -> str:
    """Why none can; nothing where one can."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the model is on {device.type}"
    return "" if _installed() else "triton is not installed (pip install triton)"


@functools.cache
def _kernel(module: str, name: str) -> Kernel:
    return getattr(importlib.import_module(module), name)


def launched(module: str, name: str, *args: Any) -> Any:
    """What a kernel of ours makes of these; None without Triton, or once it failed, which warns.

    Args:
        module: the file that defines it, which imports triton.
        name: its function there.
        args: what the function takes.
    """
    if name in _FAILED or not _installed():
        return None
    try:
        return _kernel(module, name)(*args)
    except Exception as error:  # whatever a compiler raises: the operators give the same numbers
        _FAILED.add(name)
        warnings.warn(
            f"the Triton kernel {name} failed ({type(error).__name__}: {error!s:.200}), so plain "
            "operators run in its place.",
            stacklevel=2,
        )
        return None
