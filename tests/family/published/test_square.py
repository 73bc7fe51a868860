"""The square image processor: torch's bicubic on 8-bit pixels, then CLIP's normalisation."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import trol.family  # noqa: F401  # registers the image processor
from trol.errors import DataError
from trol.family.published.processors import SquareImageProcessor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def drawn(width, height):
    y, x, channel = np.ogrid[:height, :width, :3]
    stripes = 60 * ((x // 7 + y // 5) % 2)
    return Image.fromarray(((x * 6 + y * 5 + 17 * channel + stripes) % 256).astype(np.uint8))


def square(pixels, **settings):
    return SquareImageProcessor(size={"height": pixels, "width": pixels}, **settings)


@pytest.mark.parametrize(("width", "height", "pixels"), [(53, 37, 20), (25, 60, 35), (11, 9, 24)])
def test_it_is_torch_bicubic_on_bytes_then_normalised(width, height, pixels):
    picture = drawn(width, height)
    given = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    resized = functional.interpolate(
        given[None], size=(pixels, pixels), mode="bicubic", align_corners=False, antialias=False
    )[0]
    raw = square(pixels, do_rescale=False, do_normalize=False)(picture, return_tensors="pt")
    assert raw["pixel_values"].dtype == torch.uint8
    assert torch.equal(raw["pixel_values"][0], resized)
    made = square(pixels)(picture, return_tensors="pt")["pixel_values"][0]
    wanted = (resized - MEAN * 255) / (STD * 255)
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0)


def test_it_is_not_what_pillow_does():
    picture = drawn(53, 37)
    pillow = np.array(picture.resize((20, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    raw = square(20, do_rescale=False, do_normalize=False)(picture)["pixel_values"][0]
    assert np.abs(raw.astype(int) - pillow).max() > 20


def test_a_picture_of_the_right_size_is_left_as_it_is():
    picture = drawn(20, 20)
    raw = square(20, do_rescale=False, do_normalize=False)(picture)["pixel_values"][0]
    assert np.array_equal(raw, np.array(picture).transpose(2, 0, 1))


def test_it_is_saved_and_opened_again(tmp_path):
    assert SquareImageProcessor().size == {"height": 490, "width": 490}
    made = square(20)
    made.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is SquareImageProcessor
    assert again.to_dict() == made.to_dict()
    picture = drawn(53, 37)
    assert np.array_equal(again(picture)["pixel_values"], made(picture)["pixel_values"])


def test_pixels_that_are_not_bytes_are_refused():
    with pytest.raises(DataError, match="float32 values; give 8-bit ones"):
        square(20)(np.zeros((9, 11, 3), dtype=np.float32))
