"""What a harness's model arguments name, opened; and the processes that share the questions."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trol.depth.attachment import depth as depth_of
from trol.training import open_model


def opened(
    name: str | Path, *, depth: str | None = None, device: str | None = None, **settings: Any
) -> tuple[Any, Any]:
    """The model called `name` on its device, in evaluation mode, and its processor.

    Args:
        name: a shipped model, a folder, a hub name, or a folder of adapters.
        depth: a plan or a policy's name, which is tried.
        device: where it goes; by default this process's accelerator, or the CPU.
        settings: as `trol.training.open_model` takes them.
    """
    model, processor = open_model(name, **settings)
    if "device_map" not in settings and "bits" not in settings:
        model.to(device or own_device())
    with in_depth(model, depth):
        return model, processor


def in_depth(model: Any, depth: str | None) -> AbstractContextManager[None]:
    """The plan or policy is in force while this is open, if one is named."""
    return nullcontext() if depth is None else depth_of(model, depth)


def own_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def joined() -> Accelerator | None:
    """What connects this process with the others that `torchrun` started; None without any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return Accelerator(cpu=not torch.accelerator.is_available())
