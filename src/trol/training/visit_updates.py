"""Low-rank updates that only second and later visits have."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trol.depth import attached
from trol.depth.stack import LayerMixin
from trol.host.classes import Specialised, restore, second_maps, specialise
from trol.host.context import CompileableContextVar
from trol.host.layers import layer_list

AGAIN = "again"
"""What PEFT calls the updates of second and later visits."""

# Nothing of it on the model: threads have their own, and checkpointing counts once more.
_VISIT = CompileableContextVar("trol_visit")


class LayerCall(Specialised):
    """In front of a traversing layer: its visits are counted from 0 in each call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output. Shape: [B, T, D]."""
        token = _VISIT.set(0)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _VISIT.reset(token)


class LayerVisit(Specialised):
    """Behind the traversing layer, in front of the host's own: it runs once for each visit."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One visit. Shape: [B, T, D]."""
        _VISIT.set((_VISIT.get() or 0) + 1)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class UpdateAgain(Specialised):
    """B of an update that is zero in the first visit: m B A x with m = [visit > 1]."""

    out_features: int

    def forward(self, state: Tensor) -> Tensor:
        """Shape: [B, T, rank] -> [B, T, out]."""
        if (_VISIT.get() or 0) > 1:
            return super().forward(state)  # type: ignore[misc]
        return state.new_zeros(*state.shape[:-1], self.out_features)


def only_again(learner: nn.Module) -> None:
    """Makes the updates named `AGAIN` run in second and later visits only, in place."""
    _, stack = attached(learner)
    layers: Any = layer_list(stack)
    for layer in layers:
        restore(layer)
        specialise(layer, LayerCall, LayerMixin, LayerVisit)
    for update in second_maps(learner, AGAIN):
        specialise(update, UpdateAgain)
