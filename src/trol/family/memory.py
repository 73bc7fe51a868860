"""Whether a model fits the memory at hand, asked before anything of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open

from trol.errors import HostError

GIB = 2**30

STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
"""Bytes of one value, by the name of its type in a safetensors file; of types not named, 1."""


def available_bytes(device: torch.device | str) -> int:
    """The bytes that can be had: those free on a GPU; on a CPU also what the system can free."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_fits(what: str, needed: int, device: torch.device | str, cure: str) -> None:
    """Raises `HostError`, which says how much is missing, unless `needed` bytes can be had.

    `cure` goes on after "; ": what to do about it.
    """
    free = available_bytes(device)
    if needed > free:
        raise HostError(
            f"{what} needs {_gib(needed)} of memory, but {_gib(free)} can be had on {device}: "
            f"{_gib(needed - free)} are missing; {cure}."
        )


def check_opening(name: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises `HostError` where the weights in `folder` must be held in memory, and cannot be.

    Never refuses what would work: weights that keep their type are mapped from their file on a
    CPU, and need none. Counted are the weights alone, at the fewest bytes they take.

    Args:
        name: what was asked for.
        folder: where its `model*.safetensors` lie; other kinds of files are not looked at.
        settings: those of `from_pretrained`.
    """
    device = _one_device(settings.get("device_map"))
    if device is None:
        return
    bits, dtype = _bits(settings.get("quantization_config")), settings.get("dtype")
    width = dtype.itemsize if isinstance(dtype, torch.dtype) else None
    mapped = device.type == "cpu"
    needed = 0
    for stored, count in _stored_values(folder).items():
        if bits is not None:
            needed += count * bits // 8
        elif not mapped or width not in {None, stored}:
            needed += count * (width or stored)
    if needed:
        cure = "close other programs, or take fewer bits or a smaller model"
        check_fits(f"opening {name}", needed, device, cure)


def _one_device(place: Any) -> torch.device | None:
    """The CPU or GPU that takes the whole model; None for several, which accelerate counts."""
    if isinstance(place, int):
        return torch.device("cuda", place)
    name = "cpu" if place is None else str(place)
    return torch.device(name) if name.partition(":")[0] in {"cpu", "cuda"} else None


def _bits(quantisation: Any) -> int | None:
    """The bits of a weight that bitsandbytes quantises; None without it."""
    for bits in (4, 8):
        if getattr(quantisation, f"load_in_{bits}bit", False):
            return bits
    return None


def _stored_values(folder: Path) -> dict[int, int]:
    """Bytes of a value -> how many values of that width lie there, read off the files' headers."""
    found: dict[int, int] = {}
    for file in folder.glob("model*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    width = STORED.get(tensor.get_dtype(), 1)
                    found[width] = found.get(width, 0) + math.prod(tensor.get_shape())
        except (SafetensorError, OSError):
            continue  # whoever opens it says what is damaged
    return found


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
