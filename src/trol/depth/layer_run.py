"""One layer in one call: what it is handed, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trol.depth.holes import Holes
from trol.depth.planes import LayerPlanes
from trol.depth.sides import Inputs
from trol.host.layers import LayerSite

Forward = Callable[..., Any]


class LayerRun:
    """One layer, one call: applies the host's own layer as often as the visit loop asks."""

    def __init__(
        self,
        layer: nn.Module,
        forward: Forward,
        site: LayerSite,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.layer, self.forward, self.site = layer, forward, site
        self.args, self.kwargs = args, kwargs
        self.cache = site.cache_in(args, kwargs)
        self.lasts = self.cache is not None
        """Whether later calls read what this one leaves."""
        self.planes: LayerPlanes | None = None
        self.holes: Holes | None = None
        self.digs = False
        """Whether tokens that skip leave holes; a cache may hold some of an earlier policy's."""
        self.rest: tuple[Any, ...] | None = None
        self.applied = 0
        self.spared = 0
        """FLOPs that packed visits left out of calls of the layer."""

    def apply(self, state: Tensor, plane: int) -> Tensor:
        """layer_l(state), reading and writing plane `plane`. Shape: [B, T, D], in and out."""
        cache = None if self.planes is None else self.planes.opened(plane)
        out = self.call(state, self.inputs(state), cache)
        self.applied += 1
        if self.planes is not None:
            self.planes.close()
        return out

    def inputs(self, state: Tensor) -> Inputs:
        """The layer's arguments beside `state` [B, T, D], with a mask that hides its holes."""
        if self.holes is None:
            return self.args, self.kwargs
        return self.holes.shown_in(self.args, self.kwargs, self.site, state)

    def call(self, state: Tensor, inputs: Inputs, cache: Any) -> Tensor:
        """The host's layer once, on these side inputs and, if not None, this cache."""
        args, kwargs = inputs
        if cache is not None:
            args, kwargs = self.site.with_cache(args, kwargs, cache)
        out = self.forward(state, *args, **kwargs)
        if not isinstance(out, tuple):
            return out
        if self.rest is None:  # what comes beside the hidden states is the first visit's
            self.rest = out[1:]
        return out[0]

    def wrap(self, state: Tensor) -> Any:
        """The layer's output in the form that its family returns; the layer has run."""
        return state if self.rest is None else (state, *self.rest)
