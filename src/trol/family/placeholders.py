"""Image placeholders: how many there must be, and whose images are whose.

Images are consumed in reading order: row by row, and within a row from left to right.
"""

from __future__ import annotations

import torch

from trol.errors import DataError


def check_count(mask: torch.Tensor, features: int, tokens_per_image: int) -> None:
    """`DataError` unless the mask [B, T] marks as many placeholders as there are features."""
    if torch.compiler.is_compiling():
        return  # a check on values would break the graph; TrolProcessor has checked before
    rows = mask.sum(-1).tolist()
    if sum(rows) != features:
        raise DataError(
            f"got {sum(rows)} image tokens in the text (row by row: {rows}), expected {features}: "
            f"{features // tokens_per_image} images of {tokens_per_image} tokens; give "
            f"{tokens_per_image} image tokens for each image (TrolProcessor does), in pixel_values "
            "all rows' images in reading order, and do not truncate a row within an image."
        )


def repeat_images(
    pixel_values: torch.Tensor, mask: torch.Tensor, tokens_per_image: int, times: int
) -> torch.Tensor:
    """Pixels [N, 3, H, W] for rows each repeated `times` times: all images of a row, again.

    Repeating image by image, as transformers does where it has not encoded them before, would
    give two copies of a row with the images a, b the images (a, a) and (b, b).
    """
    rows = pixel_values.split((mask.sum(-1) // tokens_per_image).tolist())
    return torch.cat([row.repeat(times, 1, 1, 1) for row in rows])
