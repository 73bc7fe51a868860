"""Small pictures, resized and cut into tiles, for tests of the checks of `units`."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .bicubic import bicubic

SIDE = 8
GRIDS = {(8, 8): (1, 1), (21, 9): (2, 1), (8, 24): (1, 3), (20, 20): (2, 2)}
"""Width and height -> columns and rows of the grid that is nearest in its aspect ratio."""

COUNTS = [
    {"width": 24, "height": 8, "max_num": 2, "use_thumbnail": True, "tiles": 3},
    {"width": 24, "height": 8, "max_num": 2, "use_thumbnail": False, "tiles": 2},
]
RESIZES = {(7, 11): 5, (9, 4): 12}
"""Height and width -> the side of the square that is made of it."""

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
"""ImageNet's, by channel."""


def resizes() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """In floats, and in 8 bits: rounded after the width and after the height."""
    tensors, distances = {}, {}
    for (height, width), side in RESIZES.items():
        pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        across, down = bicubic(width, side).T, bicubic(height, side)
        floats = down @ pixels.double() @ across
        u8 = _rounded(down @ _rounded(pixels.double() @ across)).to(torch.uint8)
        group = f"resize.{height}x{width}to{side}"
        made = {"image_u8": pixels, "u8_path": u8, "float_path": floats.float()}
        tensors |= {f"{group}.{name}": tensor for name, tensor in made.items()}
        apart = (u8 - floats.clamp(0, 255)).abs()
        facts = {"max_abs_vs_clamped_float": apart.max(), "mean_abs": apart.mean()}
        distances[group] = {name: float(fact) for name, fact in facts.items()}
    return tensors, {"resize_u8_vs_float": distances}


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255)


def small_tiles() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random pictures, whose tiles are kept whole."""
    tensors = {}
    for (width, height), grid in GRIDS.items():
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
        tiles = _tiles(pixels, grid)
        made = {"image_u8": pixels.permute(2, 0, 1), "tiles_u8_hwc": tiles}
        made["normalised"] = _normalised(tiles)
        group = f"tiles{SIDE}.{width}x{height}"
        tensors |= {f"{group}.{name}": tensor for name, tensor in made.items()}
    return tensors, {}


def tile_tables() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pictures by the formula that all sets share, whose tiles are kept as digests and means."""
    tensors, rows = {}, []
    for (width, height), grid in GRIDS.items():
        tiles = _tiles(_formula(width, height), grid)
        corner = f"tiles{SIDE}.{width}x{height}.tile{len(tiles) - 1}_corner8"
        tensors[corner] = tiles[-1, :4, :4]
        normalised = _normalised(tiles).double()
        digests = [hashlib.sha256(tile.numpy().tobytes()).hexdigest()[:16] for tile in tiles]
        rows.append(
            {
                "width": width,
                "height": height,
                "grid": list(grid),
                "tiles": len(tiles),
                "thumbnail": len(tiles) > 1,
                "sizes": [[SIDE, SIDE]],
                "tile_sha256": digests,
                "tile_means": tiles.double().mean((1, 2, 3)).tolist(),
                "normalised_first_mean": normalised[0].mean((1, 2)).tolist(),
                "normalised_last_std": normalised[-1].std((1, 2)).tolist(),
            }
        )
    return tensors, {f"tiling{SIDE}": rows, "tiling_minmax": COUNTS}


def _formula(width: int, height: int) -> Tensor:
    """(4 x + 5 y + 17 c + 60 ((x // 7 + y // 5) mod 2)) mod 256. Shape: [H, W, 3]."""
    y, x, c = np.ogrid[:height, :width, :3]
    values = 4 * x + 5 * y + 17 * c + 60 * ((x // 7 + y // 5) % 2)
    return torch.from_numpy((values % 256).astype(np.uint8))


def _tiles(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pillow's bicubic picture cut row by row; of several tiles, the whole comes last.

    [H, W, 3] -> [n, SIDE, SIDE, 3], uint8.
    """
    columns, rows = grid
    whole = Image.fromarray(pixels.numpy())
    large = _resized(whole, columns, rows)
    tiles = [
        large[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(tiles if len(tiles) == 1 else [*tiles, _resized(whole, 1, 1)])


def _resized(whole: Image.Image, columns: int, rows: int) -> Tensor:
    size = columns * SIDE, rows * SIDE
    return torch.from_numpy(np.array(whole.resize(size, Image.Resampling.BICUBIC)))


def _normalised(tiles: Tensor) -> Tensor:
    return ((tiles / 255 - MEAN) / STD).permute(0, 3, 1, 2)
