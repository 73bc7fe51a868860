"""What policies share: settings that are dataclass fields, and parameters of their own.

Parameters know whether they were trained or loaded, and a policy warns when it first uses others.
"""

import math
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from trol.depth import AbstractPolicy, Visit
from trol.errors import warn_untrained
from trol.host.classes import trained_copy
from trol.host.weights import is_at_hand
from trol.strict import plain

SkippedKV = Literal["project", "hole"]
"""What later tokens see of a token that skipped a layer; see `AbstractPolicy.skipped_kv`."""

SHARED_SETTINGS = ("scope", "training_scope", "skipped_kv", "keep_first")
"""Settings that `AbstractPolicy` keeps and checks for those policies that offer them."""

COMPARED = 8
"""Numbers of each parameter that are remembered: an optimiser moves all of them."""

WARNED = ("untrained",)
"""The note of a forward pass in which the warning was given."""


class DataclassPolicy(AbstractPolicy):
    """A policy whose settings are its fields: decorate it with `@dataclass(eq=False, repr=False)`.

    Not frozen: `__post_init__` checks settings, and keeps them in one form (a list as a tuple).
    """

    def __post_init__(self) -> None:
        names = {field.name for field in fields(cast(Any, self))}
        super().__init__(**{name: getattr(self, name) for name in SHARED_SETTINGS if name in names})

    def settings(self) -> dict[str, Any]:
        return {field.name: plain(getattr(self, field.name)) for field in fields(cast(Any, self))}


class PolicyModule(nn.Module):
    """Parameters of a policy, which know whether they still have their first values.

    The values themselves are compared, so training, loading and copying are all noticed.
    """

    first_values: list[list[float]] | None = None
    """Some numbers of each parameter before training; None if the warning is not needed."""
    sets_first_values = True
    """Tells the stack's `_init_weights` to call `reset_parameters` and leave the module alone."""

    def reset_parameters(self) -> None:
        """Sets the parameters to their first values."""
        raise NotImplementedError

    def mark_untrained(self) -> None:
        """Remembers the parameters' present values as those before training."""
        parameters = list(self.parameters())
        on_meta = any(p.is_meta for p in parameters)
        self.first_values = None if on_meta else [_some(p).tolist() for p in parameters]

    def mark_trained(self) -> None:
        """Takes the parameters as trained, whatever their values."""
        self.first_values = None

    def is_untrained(self) -> bool:
        """Whether the parameters have the values that `mark_untrained` remembered."""
        return self.first_values is not None and all(
            torch.tensor(first, dtype=p.dtype).tolist() == _some(p).tolist()
            for first, p in zip(self.first_values, self.parameters(), strict=True)
        )


def _some(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:COMPARED].cpu()


def warn_if_untrained(visit: Visit, what: str) -> None:
    """Warns once if `visit` uses untrained parameters in evaluation.

    `what` says what such parameters do, and how to do without training them, if that is possible.
    """
    if visit.context.training or torch.compiler.is_compiling():
        return
    module = trained_copy(visit.gate)
    if not isinstance(module, PolicyModule) or module.first_values is None:
        return
    if not all(map(is_at_hand, module.parameters())):
        return  # offloaded or sharded: their values cannot be read here
    untrained = module.is_untrained()
    module.mark_trained()  # compared only once
    if untrained and WARNED not in visit.context.notes:
        visit.context.notes[WARNED] = True
        warn_untrained(
            f"{what} Train them (`trol train`), or load them (trol.load, trol.load_model)."
        )


class PolicyLinear(PolicyModule):
    """Parameters of y = W x + b with nn.Linear's own first values; W is [out, in], b [out].

    Not an `nn.Linear`, so that whatever looks for a host's linear maps (LoRA on all of them,
    quantisation, FLOPs of a layer) does not take it for one.
    """

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(narrow, wide))
        self.bias = nn.Parameter(torch.empty(narrow))
        nn.Linear.reset_parameters(cast(Any, self))  # which reads these two alone


def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b in float32, under autocast as well. Shape: [..., in] -> FloatTensor [..., out]."""
    device = input.device.type
    on = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if on else nullcontext():
        return nn.functional.linear(input.float(), weight.float(), bias.float())


def init_linear(weight: Tensor, bias: Tensor) -> None:
    """First values as nn.Linear's own, [out, in] and [out]; values that were loaded stay."""
    init.kaiming_uniform_(weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(weight.shape[1])
    init.uniform_(bias, -bound, bound)
