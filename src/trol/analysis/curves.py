"""Curves over the steps of a training run."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps, rc_context

from trol.analysis.charts import STYLE, as_svg, new_axes

NAMED = 8
"""Layers, at most, that are named in the legend one by one."""


def gates_over_time(stage: str, steps: Sequence[int], gates: Sequence[Sequence[float]]) -> str:
    """Mean gate of each layer by step, a line per layer, first layers dark. Shape: [points, L]."""
    with rc_context(STYLE):
        figure, axes = new_axes(4.4, 2.5)
        layers = list(zip(*gates, strict=True))
        shades = colormaps["viridis"].resampled(len(layers) + 1)
        named = {0, len(layers) - 1} if len(layers) > NAMED else set(range(len(layers)))
        for layer, values in enumerate(layers):
            label = f"layer {layer}" if layer in named else None
            axes.plot(steps, values, color=shades(layer), linewidth=1.1, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("mean gate")
        axes.set_ylim(0, 1)
        axes.legend(fontsize=8)
        return as_svg(figure, f"gates-{stage}")
