"""The processes of one run, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from torch import distributed


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def join() -> None:
    """Opens what the processes talk through; nothing where there is one process."""
    if count() > 1:
        PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Whether there is nothing but processors; Trainer must be told, or ranks train alone."""
    return not torch.accelerator.is_available()


def wait() -> None:
    """Waits until every process is here."""
    if _together():
        distributed.barrier()


def any_of(answer: bool) -> bool:
    """Whether any process answers yes; all of them get the same answer."""
    if not _together():
        return answer
    said = torch.tensor(float(answer), device=PartialState().device)
    distributed.all_reduce(said, op=distributed.ReduceOp.MAX)
    return bool(said.item())


def leave() -> None:
    """Closes what the processes talk through; nothing where there is one process."""
    if _together():
        distributed.destroy_process_group()


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
