"""The map: where image tokens and words of a prompt went twice, layer by layer, as one picture.

A map is made of the trace of one prompt with one picture. Shapes: L layers, R visits at most,
T tokens of the trace (the prompt first, then the answer), N image tokens, W words of the question.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from trol.errors import UsageError

PANELS_PER_ROW = 6
LINE_CHARACTERS = 84
COLORS = colormaps["viridis"]
INK = "#1c1f24"
FAINT = "#6b7280"


@dataclass(frozen=True)
class DepthMap:
    """The visits of one prompt; a gate is the share of the output that later visits gave."""

    picture: Image.Image
    grid: tuple[int, int]
    """Rows and columns of image tokens; rows * columns = N."""
    gates: np.ndarray
    """[L, N] over image tokens, in reading order."""
    visits: np.ndarray
    """[L, N] times each image token visited each layer."""
    words: Sequence[str]
    """[W] the question's tokens as text."""
    word_gates: np.ndarray
    """[L, W] over the question's tokens."""
    title: str = ""

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        rows, columns = self.grid
        layers = self.gates.shape[0]
        expected = {
            "gates": (self.gates.shape, (layers, rows * columns)),
            "visits": (self.visits.shape, (layers, rows * columns)),
            "word_gates": (self.word_gates.shape, (layers, len(self.words))),
        }
        for name, (shape, wanted) in expected.items():
            if shape != wanted:
                raise UsageError(
                    f"map: {name} has shape {shape}; a {rows} x {columns} grid, {layers} layers "
                    f"and {len(self.words)} words need {wanted}."
                )


def grid_of(tokens: int, picture_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns for `tokens` image tokens: the factors nearest to the picture's shape."""
    side = math.isqrt(tokens)
    if side * side == tokens:
        return side, side
    width, height = picture_size
    rows = min(
        (r for r in range(1, tokens + 1) if tokens % r == 0),
        key=lambda r: round(abs(math.log((r * r / tokens) * (width / height))), 9),
    )
    return rows, tokens // rows


def draw(depth_map: DepthMap, dpi: int = 120) -> bytes:
    """The PNG of `depth_map`: one panel per layer over the picture, below it the words."""
    layers = depth_map.gates.shape[0]
    panels = layers + 1
    columns = min(panels, PANELS_PER_ROW)
    rows = math.ceil(panels / columns)
    lines = word_lines(depth_map.words)
    width = 1.75 * max(columns, 5)
    panel = width / columns
    words_height = 0.24 * layers * len(lines) + 0.28 * len(lines)
    height = 0.5 + rows * (panel + 0.18) + words_height + 0.65
    figure = Figure(figsize=(width, height), facecolor="white", dpi=dpi)
    top = 1 - 0.4 / height
    figure.text(0.012, 1 - 0.1 / height, depth_map.title, color=INK, fontsize=10, va="top")
    for index in range(panels):
        row, column = divmod(index, columns)
        bottom = top - (row + 1) * (panel + 0.18) / height
        box = (column / columns + 0.008, bottom, 1 / columns - 0.016, (panel - 0.06) / height)
        _panel(figure.add_axes(box), depth_map, layer=index - 1)
    words_box = (0.012, 0.6 / height, 0.976, words_height / height)
    _words(figure.add_axes(words_box), depth_map, lines)
    _legend(figure, height)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def word_lines(words: Sequence[str]) -> list[list[int]]:
    """The indices of `words` broken into lines of at most LINE_CHARACTERS characters."""
    lines: list[list[int]] = [[]]
    used = 0
    for index, word in enumerate(words):
        if lines[-1] and used + _cell(word) > LINE_CHARACTERS:
            lines.append([])
            used = 0
        lines[-1].append(index)
        used += _cell(word)
    return lines


def _cell(word: str) -> int:
    """Characters that the box of `word` takes."""
    return len(word.strip()) + 2


def _panel(axes: Any, depth_map: DepthMap, layer: int) -> None:
    """One layer over the dimmed picture (layer -1: the picture itself)."""
    axes.set_axis_off()
    if layer < 0:
        axes.imshow(depth_map.picture, interpolation="nearest")
        axes.set_title("picture", fontsize=8, color=FAINT, pad=3)
        return
    gates = depth_map.gates[layer].reshape(depth_map.grid)
    again = depth_map.visits[layer].reshape(depth_map.grid) >= 2
    axes.imshow(_tinted(depth_map.picture, gates, again), interpolation="nearest")
    title = f"layer {layer}: {again.mean():.0%} twice, gate {gates.mean():.2f}"
    axes.set_title(title, fontsize=7, color=INK, pad=3)


def _tinted(picture: Image.Image, gates: np.ndarray, again: np.ndarray) -> np.ndarray:
    """The picture in grey, in the colour of its gate where a token went again. Shape: [H, W, 3]."""
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None] / 255  # Shape: [H, W, 1]
    rows = np.arange(grey.shape[0]) * gates.shape[0] // grey.shape[0]
    columns = np.arange(grey.shape[1]) * gates.shape[1] // grey.shape[1]
    cells = np.ix_(rows, columns)
    color = 0.15 + 0.85 * COLORS(gates)[..., :3][cells]
    return np.where(again[cells][..., None], color * (0.45 + 0.55 * grey), 0.45 + 0.5 * grey)


def _words(axes: Any, depth_map: DepthMap, lines: list[list[int]]) -> None:
    """The question once per layer, each word on the colour of its gate."""
    layers = depth_map.word_gates.shape[0]
    axes.set_xlim(0, LINE_CHARACTERS + 9)
    axes.set_ylim(len(lines) * (layers + 1.1), 0)
    axes.set_axis_off()
    y = 0.2
    for line in lines:
        for layer in range(layers):
            axes.text(0, y + 0.5, f"layer {layer}", fontsize=8, color=FAINT, va="center")
            x = 9.0
            for index in line:
                _word(axes, depth_map.words[index], depth_map.word_gates[layer, index], (x, y))
                x += _cell(depth_map.words[index])
            y += 1
        y += 1.1


def _word(axes: Any, word: str, gate: float, at: tuple[float, float]) -> None:
    """One word in its box, black or white by what reads better."""
    color = COLORS(float(gate))
    axes.add_patch(Rectangle(at, _cell(word) - 0.15, 0.9, color=color, linewidth=0))
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = INK if luminance > 0.5 else "white"
    center = (at[0] + _cell(word) / 2 - 0.08, at[1] + 0.47)
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "family": "monospace"}
    # A word may hold a dollar sign: it is never mathematics here.
    axes.text(*center, word.strip(), fontsize=7.5, color=ink, parse_math=False, **style)


def _legend(figure: Figure, height: float) -> None:
    """The colour scale, and what no colour means."""
    axes = figure.add_axes((0.02, 0.3 / height, 0.3, 0.12 / height))
    bar = figure.colorbar(ScalarMappable(cmap=COLORS), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=7, length=2, color=FAINT, labelcolor=FAINT, pad=1)
    text = "gate: the share of a layer's output that the second visit gave; grey: visited once"
    figure.text(0.345, 0.36 / height, text, fontsize=8, color=FAINT, va="center")


def map_of(
    visits: Tensor,
    weights: Tensor,
    input_ids: Tensor,
    *,
    picture: Image.Image,
    image_token: int,
    tokenizer: Any,
    title: str = "",
) -> DepthMap:
    """The map of one prompt with one picture.

    Shapes: visits [L, T], weights [L, R + 1, T] (the weight of each visit's output, of no visit
    first), input_ids [prompt tokens]. The gate of a token is the weight of its later visits.
    """
    tokens = input_ids.cpu().numpy()
    gates = weights[:, 2:].sum(1)[:, : len(tokens)].float().cpu().numpy().clip(0, 1)
    image = np.flatnonzero(tokens == image_token)
    if not len(image):
        raise UsageError("the prompt holds no image token; give one picture with --image.")
    hidden = {image_token, tokenizer.pad_token_id}  # role marks are shown: they go twice as well
    words = {
        place: word
        for place, token in enumerate(tokens.tolist())
        if token not in hidden and (word := str(tokenizer.decode([token])).strip())
    }
    return DepthMap(
        picture=picture,
        grid=grid_of(len(image), picture.size),
        gates=gates[:, image],
        visits=visits.cpu().numpy()[:, image],
        words=list(words.values()),
        word_gates=gates[:, list(words)],
        title=title,
    )


def as_values(depth_map: DepthMap) -> dict[str, Any]:
    """`depth_map` as plain values, gates to four digits; one list per layer."""
    return {
        "layers": len(depth_map.gates),
        "gate_per_layer": depth_map.gates.mean(1).round(4).tolist(),
        "image": {
            "grid": list(depth_map.grid),
            "gates": depth_map.gates.round(4).tolist(),
            "visits": depth_map.visits.tolist(),
        },
        "words": {
            "text": list(depth_map.words),
            "gates": depth_map.word_gates.round(4).tolist(),
        },
    }
