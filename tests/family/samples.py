"""Sample pictures, conversations and weights for the tests of the family."""

import numpy as np
import torch
from PIL import Image

TEXTS = ["What digit is above the red 7?", "The blue digit is 3, not 4.", "Yes. No. Count them!"]


def enlarged(model):
    """The model in eval mode, its matrices drawn anew with a standard deviation of 0.15."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(text: str, *pictures: Image.Image) -> list[dict]:
    parts = [{"type": "image", "image": one} for one in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def rows() -> list[list[dict]]:
    """One image, none, and two images with a longer text."""
    return [
        question("what digit is this", picture(0)),
        question("count them"),
        question("is the red digit above the blue digit", picture(1), picture(2)),
    ]
