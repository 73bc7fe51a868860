"""The image processor of TroL-3.8B: one to six square tiles, and the whole picture once more."""

from __future__ import annotations

from transformers import GotOcr2ImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


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
