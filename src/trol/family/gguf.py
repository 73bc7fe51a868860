"""GGUF files: one by itself or the only one of a folder, and the plain folder that one becomes."""

import re
import struct
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from trol.errors import DataError, HostError, UsageError
from trol.host.weights import forget_quantisation

FULL = 16
"""Bits from which numbers are no quantised ones."""

MAGIC = b"GGUF"
"""What such a file begins with."""

FAULTS = (struct.error, ArithmeticError, LookupError, MemoryError)
"""What else readers of such files raise, besides OSError and ValueError, where one is damaged."""


def file_of(source: Path, settings: Mapping[str, Any]) -> Path | None:
    """The GGUF file that is meant by a path and the settings of `from_pretrained`; None for none.

    Raises as `check_file`, and `UsageError` where a folder without a configuration holds several.
    """
    folder = source / settings.get("subfolder", "")
    if settings.get("gguf_file"):
        file = folder / settings["gguf_file"] if source.is_dir() else None  # or of a hub name
    elif source.suffix == ".gguf":
        file = source
    elif (folder / "config.json").is_file():
        return None
    else:
        files = sorted(folder.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:4])
            raise UsageError(f"{folder} holds {len(files)} GGUF files ({names}); name one of them.")
        file = files[0] if files else None
    if file is not None:
        check_file(file)
    return file


def check_file(file: Path) -> None:
    """Raises unless `file` can be a GGUF file that is opened here.

    Raises:
        UsageError: there is no such file.
        DataError: it is none.
        HostError: the package that reads them is not installed.
    """
    if not file.is_file():
        raise UsageError(f"there is no GGUF file '{file}' here; check its name.")
    with file.open("rb") as opened:
        begins = opened.read(len(MAGIC))
    if begins != MAGIC:
        raise DataError(
            f"{file} is no GGUF file: it begins with {begins!r}, expected {MAGIC!r}; download "
            "it again, or give the folder that holds a model."
        )
    if find_spec("gguf") is None:
        raise HostError(f"{file} needs the package gguf to be read; run: pip install gguf")


def weights_in(file: Path, dtype: str) -> str:
    """What the weights of a file are, and what `dtype` makes of them here: bits, kinds, shares."""
    from gguf import GGUFReader  # noqa: PLC0415 - a package of its own, for such files alone

    counts: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = [f"{kind} {count / counts.total():.1%}" for kind, count in counts.most_common()]
    ((most, _),) = counts.most_common(1)
    bits = int(re.findall(r"\d+", most)[0])  # Q4_1, IQ2_XXS, BF16: always the first number
    return f"{bits}-bit ({', '.join(shares)}), {'widened to' if bits < FULL else 'here'} {dtype}"


def unpack_model(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file into a folder, as any other model lies: with full weights."""
    check_file(file)
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**place)
    forget_quantisation(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
