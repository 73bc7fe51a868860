"""One layer in one call: what it is handed, and what it gives back."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

from torch import Tensor, nn

from trol.depth.planes import Holes, LayerPlanes
from trol.execution.token_wise import VisitingQueries, VisitingTokens
from trol.host.cache import KeysWritten
from trol.host.layers import LayerSignature, hide_keys, is_causal
from trol.host.names import with_parts

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer takes beside the hidden states."""


class LayerRun:
    """One layer, one call: applies the host's own layer as often as the visit loop asks."""

    def __init__(
        self,
        layer: nn.Module,
        forward: Any,
        site: LayerSignature,
        given: Inputs,
        cache: Any,
        *,
        attention: str | None,
    ) -> None:
        self.attention = attention
        self.layer, self.forward, self.site = layer, forward, site
        self.given, self.cache = given, cache
        self.lasts = cache is not None
        """Whether later calls read what this one leaves."""
        self.planes: LayerPlanes | None = None
        self.holes: Holes | None = None
        self.digs = False
        """Whether tokens that skip leave holes; a cache may hold some of an earlier policy's."""
        self.rest: tuple[Any, ...] | None = None
        self.applied = 0

    def apply(
        self,
        state: Tensor,
        plane: int,
        going: VisitingTokens | None = None,
        *,
        attending: VisitingQueries | None = None,
        inputs: Inputs | None = None,
        leaves: bool = False,
    ) -> Tensor:
        """layer_l(state), reading and writing plane `plane`. Shape: [B, T, D], in and out.

        Args:
            state: what enters it.
            plane: which keys and values.
            going: who goes, if the layer's token-wise parts shall compute no others.
            attending: the same for its attention.
            inputs: its arguments beside the state, if they are not the call's.
            leaves: whether it is left once keys and values are stored (`KeysWritten`).
        """
        args, kwargs = inputs or (self.given if self.holes is None else self.inputs(state))
        if self.planes is not None:
            cache = self.planes.opened(plane, leaves=leaves)
            if cache is not self.cache or not self.lasts:
                args, kwargs = self.site.with_cache(args, kwargs, cache)
        if going is None:
            out = self.forward(state, *args, **kwargs)
        else:
            layer = with_parts(self.layer, self.site.parts, going.stand_in)
            with attending or nullcontext():
                out = self.forward.__func__(layer, state, *args, **kwargs)
        self.applied += 1
        if self.planes is not None:
            self.planes.close()
        if not isinstance(out, tuple):
            return out
        if self.rest is None:  # what comes beside the hidden states is the first visit's
            self.rest = out[1:]
        return out[0]

    def leave(self, state: Tensor, plane: int) -> bool:
        """Enters the layer for its keys and values alone; says whether it can be left there."""
        if self.planes is None or not self.planes.stores_keys(plane):
            return False
        with suppress(KeysWritten):
            self.apply(state, plane, leaves=True)
        self.planes.close()
        return True

    def inputs(self, state: Tensor) -> Inputs:
        """The layer's arguments beside `state` [B, T, D], with a mask that hides its holes."""
        if self.holes is None:
            return self.given
        args, kwargs = self.given
        mask = hide_keys(
            self.site.mask_in(args, kwargs),
            *self.holes.hidden_from(state),
            attention=self.attention,
            causal=is_causal(self.layer, kwargs),
            dtype=state.dtype,
        )
        return self.site.with_mask(args, kwargs, mask)

    def wrap(self, state: Tensor) -> Any:
        """The layer's output in the form that its family returns; the layer has run."""
        return state if self.rest is None else (state, *self.rest)
