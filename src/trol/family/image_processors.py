"""The image processor of TroL-1.8B and -7B: one square picture, resized as torch does it.

The image processor of TroL-3.8B: one to six square tiles, and the whole picture once more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import GotOcr2ImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from trol.errors import DataError


class SquareImageProcessor(PilBackend):
    """Resizes to `size` whatever the aspect ratio, then normalises: (x/255 - mean) / std.

    The resize is torch's bicubic interpolation of the 8-bit pixels, not antialiased: the published
    models were evaluated so, and Pillow's bicubic differs from it wherever a picture shrinks.
    """

    size = {"height": 490, "width": 490}  # noqa: RUF012  # as in every image processor
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def resize(self, image: np.ndarray, size: SizeDict, *_: Any, **__: Any) -> np.ndarray:
        """The picture [3, H, W] at the given height and width; `DataError` unless it is 8-bit."""
        if image.dtype != np.uint8:
            raise DataError(
                f"the picture has {image.dtype} values; give 8-bit ones (uint8, 0 to 255), "
                "which is what the model's way of resizing is defined on."
            )
        pixels = torch.from_numpy(np.ascontiguousarray(image))[None]
        target = (int(size["height"]), int(size["width"]))
        resized = functional.interpolate(pixels, size=target, mode="bicubic", align_corners=False)
        return resized[0].numpy()


class TiledImageProcessor(GotOcr2ImageProcessorPil):
    """Cuts a picture into the grid of tiles [3, H, W] nearest its aspect ratio, row by row.

    Of more than one tile a thumbnail comes last. A class of its own, so that a saved processor is
    opened as this one: under the parent's name torchvision's, which resizes differently, would be
    taken wherever torchvision is installed.
    """

    size = {"height": 448, "width": 448}  # noqa: RUF012  # as in every image processor
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    crop_to_patches = True
    max_patches = 6
