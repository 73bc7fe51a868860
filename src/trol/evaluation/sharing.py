"""Questions spread over the processes that `torchrun` started, and their scores put together.

Whole batches are dealt out in turn, so that every batch is the one that a single process makes.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import distributed

from trol.evaluation.items import BATCH, Item

Value = TypeVar("Value")


def place() -> tuple[int, int]:
    """This process's number, and how many there are that measure together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def dealt(items: Sequence[Item]) -> list[Item]:
    """The items that are this process's."""
    number, processes = place()
    return [item for at, item in enumerate(items) if at // BATCH % processes == number]


def gathered(values: Sequence[Value], count: int) -> list[Value]:
    """The values of all `count` items in their order; `values` are those of this process's items.

    Every process has to call it.
    """
    _, processes = place()
    if processes == 1:
        return list(values)
    parts: list[Any] = [None] * processes
    distributed.all_gather_object(parts, list(values))
    turns = [iter(part) for part in parts]
    return [next(turns[at // BATCH % processes]) for at in range(count)]
