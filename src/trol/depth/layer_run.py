"""`LayerRun`: the host's own layer, its inputs and its cache, during one forward pass."""

from contextlib import nullcontext, suppress
from typing import Any

from torch import nn

from trol.axes import States
from trol.depth.planes import Holes, LayerPlanes
from trol.execution.token_wise import VisitingQueries, VisitingTokens
from trol.host.cache import KeysWritten
from trol.host.layers import LayerSignature, hide_keys, is_causal
from trol.host.names import with_parts

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""A layer's arguments beside the hidden states."""


class LayerRun:
    """Applies the host's own layer as often as the visit loop asks, during one forward pass."""

    def __init__(
        self,
        layer: nn.Module,
        forward: Any,
        signature: LayerSignature,
        given: Inputs,
        cache: Any,
        *,
        attention: str | None,
    ) -> None:
        self.attention = attention
        self.layer, self.forward, self.signature = layer, forward, signature
        self.given, self.cache = given, cache
        self.persists = cache is not None
        """Whether later calls read the keys and values that this one leaves."""
        self.planes: LayerPlanes | None = None
        self.holes: Holes | None = None
        self.leaves_holes = False
        """Whether tokens that skip leave holes; a cache may hold some of an earlier policy's."""
        self.extra_outputs: tuple[Any, ...] | None = None
        self.times_applied = 0

    def apply(
        self,
        state: States,
        plane: int,
        going: VisitingTokens | None = None,
        *,
        attending: VisitingQueries | None = None,
        inputs: Inputs | None = None,
        stop_after_keys: bool = False,
    ) -> States:
        """layer_l(state), reading and writing plane `plane`. Shape: [B, T, D], in and out.

        Args:
            state: the hidden states that enter the layer.
            plane: the plane whose keys and values it reads and writes.
            going: the tokens that the layer's token-wise parts compute; None for all.
            attending: attention over these tokens' queries alone.
            inputs: arguments beside the state, where they are not those of the call.
            stop_after_keys: whether to stop once keys and values are stored (raises `KeysWritten`).
        """
        args, kwargs = inputs or (self.given if self.holes is None else self.inputs(state))
        if self.planes is not None:
            cache = self.planes.enter_visit(plane, stop_after_keys=stop_after_keys)
            if cache is not self.cache or not self.persists:
                args, kwargs = self.signature.with_cache(args, kwargs, cache)
        if going is None:
            out = self.forward(state, *args, **kwargs)
        else:
            layer = with_parts(self.layer, self.signature.parts, going.stand_in)
            with attending or nullcontext():
                out = self.forward.__func__(layer, state, *args, **kwargs)
        self.times_applied += 1
        if self.planes is not None:
            self.planes.exit_visit()
        if not isinstance(out, tuple):
            return out
        if self.extra_outputs is None:  # a family's other outputs are those of the first visit
            self.extra_outputs = out[1:]
        return out[0]

    def leave(self, state: States, plane: int) -> bool:
        """Runs the layer up to its keys and values; False where it cannot be stopped there."""
        if self.planes is None or not self.planes.stores_keys(plane):
            return False
        with suppress(KeysWritten):
            self.apply(state, plane, stop_after_keys=True)
        self.planes.exit_visit()
        return True

    def inputs(self, state: States) -> Inputs:
        """The layer's arguments beside `state` [B, T, D], with a mask that hides its holes."""
        if self.holes is None:
            return self.given
        args, kwargs = self.given
        mask = hide_keys(
            self.signature.mask_in(args, kwargs),
            *self.holes.hidden_from(state),
            attention=self.attention,
            causal=is_causal(self.layer, kwargs),
            dtype=state.dtype,
        )
        return self.signature.with_mask(args, kwargs, mask)

    def wrap(self, state: States) -> Any:
        """The layer's output in the form that its family returns; the layer has run."""
        return state if self.extra_outputs is None else (state, *self.extra_outputs)
