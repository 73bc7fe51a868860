"""Boards: pictures of 3x3 grids of real handwritten digits on coloured tiles.

A board is drawn from (split, seed) alone. The digits are the 1,797 8x8 scans that scikit-learn
carries; each split owns its scans, so no test scan is ever seen in training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from trol.errors import UsageError, unknown

SIDE = 3
"""Cells per row and per column."""

CELL_PIXELS = 16
"""Width and height of one cell in pixels; a patch of this size sees exactly one cell."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 50, 45),
    "green": (50, 150, 65),
    "blue": (50, 85, 200),
    "yellow": (225, 190, 45),
    "purple": (140, 60, 165),
}
"""Tile colour by name, RGB 0-255."""

SPLITS: dict[str, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""Share of the scans that each split owns."""

_FLOOR = (236, 234, 228)
_INK = (20, 20, 24)
_SPLIT_SEED = 20240913
_VARIANTS = 8


@dataclass(frozen=True)
class Tile:
    """One filled cell: a colour name, a digit 0-9, and the number of the scan that shows it."""

    colour: str
    digit: int
    scan: int

    @property
    def name(self) -> str:
        """How sentences call the tile, for example `red 7`."""
        return f"{self.colour} {self.digit}"


@dataclass(frozen=True)
class Board:
    """Nine cells in reading order, each a tile or empty; no two tiles share colour and digit."""

    split: str
    seed: int
    cells: tuple[Tile | None, ...]

    @property
    def tiles(self) -> dict[int, Tile]:
        """Cell number (0-8, reading order) -> tile, filled cells only."""
        return {place: tile for place, tile in enumerate(self.cells) if tile is not None}


def split_scans(split: str) -> dict[int, tuple[int, ...]]:
    """Digit 0-9 -> the numbers of the scans of it that this split owns."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return _scans_by_split()[split]


def make_board(split: str, seed: int, *, fewest: int = 4, most: int = 9) -> Board:
    """The board of this split and seed, with `fewest` to `most` tiles (1-9) on it."""
    if not 1 <= fewest <= most <= SIDE * SIDE:
        raise UsageError(
            f"a board cannot have {fewest} to {most} tiles; give 1 <= fewest <= most <= 9."
        )
    scans = split_scans(split)
    rng = random.Random(f"board/{split}/{seed}")
    count = rng.randint(fewest, most)
    names = tuple(COLOURS)
    cells: list[Tile | None] = [None] * (SIDE * SIDE)
    pairs = rng.sample(range(len(names) * 10), count)  # distinct: "the red 7" is one tile
    for place, pair in zip(rng.sample(range(SIDE * SIDE), count), pairs, strict=True):
        digit = pair % 10
        cells[place] = Tile(names[pair // 10], digit, rng.choice(scans[digit]))
    return Board(split, seed, tuple(cells))


def draw(board: Board, *, vary: bool | None = None) -> Image.Image:
    """The board as a 48x48 RGB picture; see `draw_array`."""
    return Image.fromarray(draw_array(board, vary=vary))


def draw_array(board: Board, *, vary: bool | None = None) -> np.ndarray:
    """The board as uint8 pixels [48, 48, 3], the same on every call.

    `vary` turns, scales and shifts each scan a little and varies light and noise; by default
    it is on for the train split and off for the others.
    """
    vary = board.split == "train" if vary is None else vary
    rng = np.random.default_rng([board.seed & 0xFFFFFFFF, len(board.split)])
    side = SIDE * CELL_PIXELS
    pixels = np.empty((side, side, 3), np.float32)
    pixels[:] = _FLOOR
    variants = rng.integers(1, _VARIANTS, SIDE * SIDE) if vary else np.zeros(SIDE * SIDE, int)
    for place, tile in board.tiles.items():
        top, left = (CELL_PIXELS * n for n in divmod(place, SIDE))
        ink = _inks()[tile.scan, variants[place], :, :, None]
        face = ink * _INK_ARRAY + (1 - ink) * _COLOUR_ARRAYS[tile.colour]
        pixels[top + 1 : top + CELL_PIXELS - 1, left + 1 : left + CELL_PIXELS - 1] = face
    if vary:
        pixels *= rng.uniform(0.85, 1.1)
        pixels += rng.standard_normal(pixels.shape, np.float32) * 6
    return np.clip(pixels, 0, 255).astype(np.uint8)


_INK_ARRAY = np.array(_INK, np.float32)
_COLOUR_ARRAYS = {name: np.array(rgb, np.float32) for name, rgb in COLOURS.items()}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All scans as ink [S, 8, 8] in 0-1, and their digits [S]."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - heavy, and only boards need it

    ink, digits = load_digits(return_X_y=True)
    return np.asarray(ink, np.float32).reshape(-1, 8, 8) / 16, np.asarray(digits)


@cache
def _scans_by_split() -> dict[str, dict[int, tuple[int, ...]]]:
    """Split -> digit -> scan numbers, every digit cut by the same shares."""
    digits = _digits()[1]
    rng = np.random.default_rng(_SPLIT_SEED)
    owned: dict[str, dict[int, tuple[int, ...]]] = {split: {} for split in SPLITS}
    for digit in range(10):
        numbers = rng.permutation(np.flatnonzero(digits == digit))
        ends = np.round(np.cumsum(list(SPLITS.values())) * len(numbers)).astype(int)
        for split, part in zip(SPLITS, np.split(numbers, ends[:-1]), strict=True):
            owned[split][digit] = tuple(int(n) for n in part)
    return owned


@cache
def _inks() -> np.ndarray:
    """Ink [S, V, 14, 14] in 0-1 of every scan: variant 0 is upright, the others vary it."""
    scans = torch.from_numpy(_digits()[0])[:, None]  # Shape: [S, 1, 8, 8]
    gen = torch.Generator().manual_seed(_SPLIT_SEED)
    size = CELL_PIXELS - 2
    inks = [_warp(scans, size=size, gen=gen, strength=float(v > 0)) for v in range(_VARIANTS)]
    return torch.stack(inks, 1).numpy()


def _warp(scans: torch.Tensor, *, size: int, gen: torch.Generator, strength: float) -> torch.Tensor:
    """Scans [S, 1, 8, 8] -> [S, size, size], turned <= 12 deg, scaled 12 %, moved 1 pixel."""
    count = len(scans)

    def spread(width: float) -> torch.Tensor:
        return (torch.rand(count, generator=gen) * 2 - 1) * width * strength

    angle, scale = spread(0.21), 1.1 * (1 + spread(0.12))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, spread(0.15), sin, cos, spread(0.15)], 1)
    grid = functional.affine_grid(rows.view(count, 2, 3), [count, 1, size, size], False)
    warped = functional.grid_sample(scans, grid, padding_mode="zeros", align_corners=False)
    return warped[:, 0].clamp(0, 1)
