"""What a harness's model arguments name, opened; and the processes that share the questions."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trol.checkpoints.adapter import is_trained
from trol.depth.attachment import depth as depth_of
from trol.family.loading import load_model
from trol.host import processes
from trol.host.weights import is_quantised
from trol.training.opening import open_trained


def opened(
    name: str | Path, *, depth: str | None = None, device: str | None = None, **settings: Any
) -> tuple[Any, Any]:
    """The model called `name` on its device, in evaluation mode, and its processor.

    Args:
        name: a shipped model, a folder, a hub name, or a folder of adapters.
        depth: a plan or a policy's name, which is tried.
        device: where it goes; by default this process's accelerator, or the CPU.
        settings: as `trol.load_model` takes them.
    """
    open_named = open_trained if is_trained(Path(name)) else load_model
    model, processor = open_named(name, **settings)
    if device is not None:
        model.to(device)
    elif "device_map" not in settings:
        on_accelerator(model)
    with in_depth(model, depth):
        return model, processor


def in_depth(model: Any, depth: str | None) -> AbstractContextManager[None]:
    """The plan or policy is in force while this is open, if one is named."""
    return nullcontext() if depth is None else depth_of(model, depth)


def on_accelerator(model: Any) -> Any:
    """The model, moved to this process's accelerator if there is one and its weights may move."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None and not is_quantised(model):
        model.to(torch.device(kind.type, processes.local_rank()))
    return model


def joined() -> Accelerator | None:
    """What connects this process with the others that `torchrun` started; None without any."""
    if processes.count() == 1:
        return None
    return Accelerator(cpu=not torch.accelerator.is_available())
