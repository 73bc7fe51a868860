"""Weights in files of bounded size, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trol.errors import DataError
from trol.family.published.weights import Weights

PARTIAL = ".partial"
"""Ends the names of files that are not yet what their name says."""


@dataclass(frozen=True)
class Shard:
    """A file of weights, and which lie in it."""

    file: str
    names: list[str]
    size: int
    """Bytes of its weights."""


def planned(shapes: Mapping[str, torch.Size], dtype: torch.dtype, most: int) -> list[Shard]:
    """The weights, in order, dealt out to files of at most `most` bytes (or of one weight)."""
    parts: list[tuple[list[str], int]] = []
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if not parts or parts[-1][1] + size > most:
            parts.append(([], 0))
        parts[-1] = ([*parts[-1][0], name], parts[-1][1] + size)
    of = len(parts)
    files = [f"model-{i:05}-of-{of:05}" for i in range(1, of + 1)] if of > 1 else ["model"]
    return [
        Shard(f"{file}.safetensors", names, size)
        for file, (names, size) in zip(files, parts, strict=True)
    ]


def write(folder: Path, shard: Shard, weights: Weights, dtype: torch.dtype) -> None:
    """Reads and writes one shard; `DataError` where the disk refuses."""
    tensors = dict(cast(weights, shard.names, dtype))
    try:
        with whole(folder / shard.file) as path:
            save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DataError(
            f"{folder / shard.file} cannot be written ({error}); once that is mended, the same "
            "command goes on where it was."
        ) from error


def holds(folder: Path, shard: Shard, weights: Weights, dtype: torch.dtype) -> bool:
    """Whether the shard lies in the folder already, equal to its source to the last bit."""
    if not (folder / shard.file).is_file():
        return False
    try:
        with safe_open(folder / shard.file, framework="pt") as opened:
            return set(opened.keys()) == set(shard.names) and all(
                same_bits(opened.get_tensor(name), tensor)
                for name, tensor in cast(weights, shard.names, dtype)
            )
    except SafetensorError:  # cut off: it is written again
        return False


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Says which shard holds which weight, where there are several."""
    if len(shards) > 1:
        listed = {name: shard.file for shard in shards for name in shard.names}
        size = {"total_size": sum(shard.size for shard in shards)}
        index = {"metadata": size, "weight_map": listed}
        write_json(folder / "model.safetensors.index.json", index)


def cast(weights: Weights, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """These weights one by one, each in memory of its own."""
    for name in names:
        yield name, weights[name][...].to(dtype, copy=True).contiguous()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write to; the file takes its own when the block ends well."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
