"""The processes that `torchrun` or `accelerate launch` started together."""

import os

import torch
from accelerate import PartialState
from torch import distributed

from trol.host import sharding


def count() -> int:
    """How many there are; 1 where nothing started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes and talks."""
    return rank() == 0


def join() -> None:
    """Connects the processes, where there are several, or one that was started to shard."""
    if count() > 1 or _sharding_is_asked_for():
        PartialState(**sharding.device_settings())


def shards() -> bool:
    """Whether each process is to keep a share of the model or its optimiser only.

    Raises:
        UsageError: with settings of FSDP under which a policy would be wrong or lost.
    """
    if not (_sharding_is_asked_for() and _are_joined()):
        return False
    sharding.check()
    return True


def _sharding_is_asked_for() -> bool:
    return sharding.is_asked_for(sharding.FSDP) or sharding.is_asked_for(sharding.DEEPSPEED)


def wait() -> None:
    """Waits until every process is here."""
    if _are_joined():
        distributed.barrier()


def any_of(answer: bool) -> bool:
    """Whether any process answers yes; all of them get the same answer."""
    if not _are_joined():
        return answer
    most = torch.tensor(float(answer), device=PartialState().device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return bool(most.item())


def leave() -> None:
    """Ends the connection of the processes, where there are several."""
    if _are_joined():
        distributed.destroy_process_group()


def _are_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
