"""What a run is made of, in a few characters: to tell whether it can be gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from trol.data.mixture import Mixture
from trol.policies.digests import numbers_digest, text_digest
from trol.training.recipe import Recipe

LOOKED_AT = 64
"""Rows whose content is looked at, from the first to the last."""

READ_WHOLE = 1 << 28
"""Bytes of files that are read to tell whether data have changed."""

MAY_CHANGE = ("save_every", "keep")
"""Keys of a recipe that say nothing about what is learnt."""


def data_fingerprint(rows: Any, collate: Callable[..., Mapping[str, Any]]) -> str:
    """Of a data set: its length, some rows all over it, and the files of a mixture.

    Files are read whole where they are at most `READ_WHOLE` bytes together; of larger ones the
    sizes and where each row begins and ends are taken.
    """
    places = np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).round().astype(int)
    batch = collate([rows[int(place)] for place in places])
    parts = [str(len(rows)), *(f"{key}{_numbers(batch[key])}" for key in sorted(batch))]
    return text_digest("\n".join([*parts, *_files(getattr(rows, "mixture", None))]))


def differences(before: str, now: Recipe) -> list[str]:
    """How a recipe written as YAML differs from another: `"seed was 0 and is 1"`."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(now.yaml()))
    keys = [key for key in {**old, **new} if key not in MAY_CHANGE]
    absent = "not there"
    return [
        f"{key} was {old.get(key, absent)} and is {new.get(key, absent)}"
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    ]


def _files(mixture: Mixture | None) -> list[str]:
    if mixture is None:
        return []
    small = sum(part.size for part in mixture.parts) <= READ_WHOLE
    found: list[str] = []
    for part in mixture.parts:
        columns = (part.index.rows, part.index.starts, part.index.ends)
        found += [_numbers(torch.from_numpy(column.copy())) for column in columns]
        if small:
            found += [hashlib.sha256(p.read_bytes()).hexdigest() for p in part.container.files]
    return found


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found


def _numbers(value: Any) -> str:
    return numbers_digest(value) if isinstance(value, Tensor) else repr(value)
