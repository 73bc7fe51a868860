"""What is put around a transformers model: PEFT, torch.compile, a head of somebody's own."""

from __future__ import annotations

from types import MethodType

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from trol.errors import HostError

SPREADING = (DataParallel, DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
"""What looks for parameters once, when it takes a model on: later ones it does not know."""

ENGINES = ("deepspeed",)
"""Packages whose wrappers do so as well."""


PREPARES = "prepare_inputs_for_generation"
KEPT = f"base_model_{PREPARES}"
"""Where PEFT's prompt learning keeps the model's own method, while it puts one in its place."""


def model_inside(model: nn.Module) -> nn.Module:
    """The outermost transformers model in a wrapper, whose `generate` is the one that runs.

    A module without any is given back as it is.

    Raises:
        HostError: the wrapper would not know the parameters that a policy brings.
    """
    package = type(model).__module__.partition(".")[0]
    if isinstance(model, SPREADING) or package in ENGINES:
        raise HostError(
            f"{type(model).__name__} has taken on its parameters already and would leave those of "
            "a policy out; attach the policy first, then wrap the model."
        )
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def rebind(wrapper: nn.Module, model: nn.Module) -> None:
    """Gives a wrapper that kept a method of the model inside the one that its class has now."""
    left = vars(model).get(PREPARES)  # PEFT leaves it on the model after its first generate
    if getattr(left, "__self__", None) is model:
        delattr(model, PREPARES)
    for around in wrapper.modules():
        if getattr(vars(around).get(KEPT), "__self__", None) is model:
            setattr(around, KEPT, MethodType(getattr(type(model), PREPARES), model))
