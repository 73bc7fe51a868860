"""Parameters of policies that nobody has trained yet: they are told of when they are first used.

A linear map of a policy's own, which nobody takes for one of the host's.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from trol.depth import Visit
from trol.errors import UntrainedWarning
from trol.host.classes import trained_copy
from trol.host.weights import is_at_hand

LOOKED_AT = 8
"""Numbers of each parameter that are kept to be compared with: an optimiser moves all of them."""

TOLD = ("untrained",)
"""The note of a forward pass in which it was said."""


class Learnt(nn.Module):
    """Parameters of a policy, which know whether they are as they were made.

    What tells is what they hold: whatever trains or loads them, or copies the module, is seen.
    """

    first: list[list[float]] | None = None
    """Some numbers of each parameter, as they were made; None where that is of no matter."""

    def begin(self) -> None:
        """Takes the parameters as those that nobody has trained."""
        made = list(self.parameters())
        self.first = None if any(p.is_meta for p in made) else [_some(p).tolist() for p in made]

    def loaded(self) -> None:
        """Takes the parameters as those that somebody has trained and saved."""
        self.first = None

    def is_as_made(self) -> bool:
        """Whether nobody has trained or loaded the parameters."""
        if self.first is None:
            return False
        now = [_some(p) for p in self.parameters()]
        return all(
            torch.tensor(then, dtype=some.dtype).tolist() == some.tolist()
            for then, some in zip(self.first, now, strict=True)
        )


def tell_untrained(visit: Visit, what: str) -> None:
    """Warns, once, where `visit` is made in evaluation with parameters that nobody has trained.

    `what` says what they do then, and what else than training cures it.
    """
    if visit.context.training or torch.compiler.is_compiling():
        return
    part = trained_copy(visit.gate)
    if not isinstance(part, Learnt) or part.first is None:
        return
    if not all(map(is_at_hand, part.parameters())):
        return  # offloaded or sharded: what they hold cannot be looked at from here
    as_made, part.first = part.is_as_made(), None  # looked at once
    if as_made and TOLD not in visit.context.notes:
        visit.context.notes[TOLD] = True
        warnings.warn(
            f"{what} Train them (`trol train`), or load them (trol.load, trol.load_model).",
            UntrainedWarning,
            stacklevel=3,
        )


def _some(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:LOOKED_AT].cpu()


class OwnLinear(Learnt):
    """Parameters of y = W x + b with nn.Linear's own first values; W is [out, in], b [out].

    No `nn.Linear`, so that what looks for linear maps in a host (LoRA on all of them,
    quantisation, FLOPs of a layer) leaves it alone.
    """

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(narrow, wide))
        self.bias = nn.Parameter(torch.empty(narrow))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters to nn.Linear's own first values."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # which reads these two alone
