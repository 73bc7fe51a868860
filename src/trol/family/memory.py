"""The memory that weights take: 4- and 8-bit weights, and whether a model fits before it is opened.

Of a TroL model only the decoder's own linear maps are quantised.
"""

import copy
import ctypes
import math
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig

from trol.errors import HostError, UsageError

NEVER = ("model.vision_tower", "model.projector", "lm_head", "depth", "image_down", "image_up")
"""Modules that keep their type: tower, projector, head, gates, and the LoRA of image tokens."""

BLOCK = 64
"""Weights that share a scale in 4 bits; a map's rows must be made of whole blocks."""
ROWS = 32
"""Rows that bitsandbytes packs together for a CPU."""

GIB = 2**30

STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
"""Bytes of one value, by the name of its type in a safetensors file; of types not named, 1."""


def quantised(bits: int, compute_dtype: torch.dtype = torch.float16) -> BitsAndBytesConfig:
    """As published: 4 bits (nf4, its scales quantised too) or 8 (int8, outliers above 6 apart).

    Raises:
        UsageError: another number of bits.
        HostError: bitsandbytes is not installed.
    """
    if bits not in (4, 8):
        raise UsageError(f"bits is {bits!r}; give 4 or 8, or leave it out for the full weights.")
    if find_spec("bitsandbytes") is None:
        raise HostError(
            f"weights of {bits} bits need bitsandbytes, which is not installed; "
            "run: pip install 'trol-vlm[quant]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_threshold=6.0,
        llm_int8_skip_modules=list(NEVER),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def skip_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a `from_pretrained`, whose bitsandbytes configuration then skips `NEVER`.

    A configuration without a list of modules to skip would quantise tower, projector and gates.
    With 8 bits the other weights are float16, unless the settings name a type.
    """
    config = settings.get("quantization_config")
    if isinstance(config, dict) and config.get("quant_method", "bitsandbytes") == "bitsandbytes":
        config = BitsAndBytesConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig):
        return settings
    config = copy.deepcopy(config)
    skipped = [*(config.llm_int8_skip_modules or []), *NEVER]
    config.llm_int8_skip_modules = list(dict.fromkeys(skipped))
    half = config.load_in_8bit and "torch_dtype" not in settings
    dtype = {"dtype": torch.float16} if half else {}
    return {**dtype, **settings, "quantization_config": config}


def check_blocks(model: nn.Module, name: str) -> None:
    """`HostError` where a 4-bit map has not the widths that bitsandbytes can compute with."""
    module: Any
    for place, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        rows, columns = module.out_features, module.in_features
        if rows % ROWS or columns % BLOCK:
            raise HostError(
                f"{name} cannot be used in 4 bits: its map {place!r} has the shape "
                f"[{rows}, {columns}], expected a multiple of {ROWS} rows and of {BLOCK} columns; "
                "take 8 bits (--bits 8, bits=8), or its full weights."
            )


def trim_memory() -> None:
    """Gives memory that is free in this process back to the operating system, where it can be.

    Quantising leaves small results between large freed inputs; glibc then keeps the latter's pages,
    up to more than the whole checkpoint's size.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def available_bytes(device: torch.device | str) -> int:
    """The bytes that can be had: those free on a GPU; on a CPU also what the system can free."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_fits(what: str, needed: int, device: torch.device | str, cure: str) -> None:
    """Raises `HostError`, which says how much is missing, unless `needed` bytes can be had.

    `cure` follows "; " in the message: what to do about it.
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
    config, dtype = settings.get("quantization_config"), settings.get("dtype")
    bits = next((b for b in (4, 8) if getattr(config, f"load_in_{b}bit", False)), None)
    width = dtype.itemsize if isinstance(dtype, torch.dtype) else None
    needed = 0
    for stored, count in _stored_values(folder).items():
        if bits is not None:
            needed += count * bits // 8
        elif device.type != "cpu" or width not in {None, stored}:
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


def _stored_values(folder: Path) -> dict[int, int]:
    """Bytes of a value -> how many values of that width lie there, read off the files' headers."""
    counts: dict[int, int] = {}
    for file in folder.glob("model*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    width = STORED.get(tensor.get_dtype(), 1)
                    counts[width] = counts.get(width, 0) + math.prod(tensor.get_shape())
        except (SafetensorError, OSError):
            continue  # opening it will say what is damaged
    return counts


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
