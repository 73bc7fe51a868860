"""What a layer takes beside the hidden states: what of it belongs to which row of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from trol.errors import HostError
from trol.host.layers import PER_KEY, PER_TOKEN


def rows_known(value: Any, name: str, batch: int) -> bool:
    """Whether it is known what of a layer's side input belongs to which row."""
    if isinstance(value, tuple | list):
        return all(rows_known(part, name, batch) for part in value)
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str | Cache)
    if name in PER_KEY:
        return len(value) % batch == 0
    return value.ndim == len(PER_TOKEN.get(name, ())) and len(value) in (1, batch)


def rows_taken(value: Any, name: str, rows: Tensor, batch: int) -> Any:
    """The part of a side input that belongs to some rows [b]; all of what belongs to none.

    Raises:
        HostError: it is not known.
    """
    if isinstance(value, tuple | list):
        return tuple(rows_taken(part, name, rows, batch) for part in value)
    if not isinstance(value, Tensor) or len(value) == 1:
        return value
    if not rows_known(value, name, batch):
        raise HostError(
            f"a layer takes {name} of shape {list(value.shape)}, of which trol does not know what "
            "belongs to which row, and its cache holds some rows alone; start a new one under "
            "trol.depth.executor(model, 'dense')."
        )
    if name in PER_KEY:
        return value.unflatten(0, (batch, -1)).index_select(0, rows).flatten(0, 1)
    return value.index_select(0, rows)
