"""Pictures: RGB and upright, or one clear error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trol.data.images import open_image
from trol.errors import DataError


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_any_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (5, 7), "red").convert(mode).save(path)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (5, 7))


RAMP = np.arange(256)[None].repeat(4, 0)
DEEP = {
    "u16.png": (RAMP * 257).astype(np.uint16),
    "u16.tif": (RAMP * 257).astype(np.uint16),
    "u16-big-endian.tif": (RAMP * 257).astype(">u2"),
    "twelve-bits.png": (RAMP * 16).astype(np.uint16),
    "few-of-many.png": (RAMP + 30000).astype(np.uint16),
    "i16.tif": (RAMP * 100 - 9000).astype(np.int16),
    "i32.tif": (RAMP * 65537 * 128 - 2**30).astype(np.int32),
    "f32.tif": (RAMP / 255).astype(np.float32),
    "metres.tif": (RAMP * 0.37 - 2).astype(np.float32),
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_of_more_than_8_bits_keeps_its_range(name: str, tmp_path: Path) -> None:
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    for source in (tmp_path / name, (tmp_path / name).read_bytes(), Image.fromarray(DEEP[name])):
        seen = np.asarray(open_image(source))
        assert (seen == RAMP[..., None]).all()


def test_values_that_are_no_range(tmp_path: Path) -> None:
    for value, shown in ((0, 0), (9, 255), (-3, 0)):
        flat = Image.fromarray(np.full((2, 2), value, np.int32))
        assert set(np.asarray(open_image(flat)).flat) == {shown}
    holes = np.array([[0, np.nan], [2, np.inf]], np.float32)
    assert np.asarray(open_image(Image.fromarray(holes)))[..., 0].tolist() == [[0, 0], [255, 255]]
    with pytest.raises(DataError, match="no finite number"):
        open_image(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "I;16"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    if mode.endswith(("A", "a")):
        clear = Image.new("RGBA", (3, 2), (200, 0, 0, 0)).convert(mode)
    else:
        path = tmp_path / "clear.png"
        Image.new(mode, (3, 2)).save(path, transparency=(0, 0, 0) if mode == "RGB" else 0)
        clear = Image.open(path)
    assert set(np.asarray(open_image(clear)).flat) == {0 if mode == "I;16" else 255}


def test_what_is_half_transparent_is_half_white() -> None:
    half = Image.new("RGBA", (3, 2), (0, 0, 0, 128))
    assert set(np.asarray(open_image(half)).flat) <= {127, 128}


def test_a_mode_that_pillow_cannot_turn_into_rgb_is_told() -> None:
    with pytest.raises(DataError, match="conversion"):
        open_image(Image.new("La", (2, 2)))


def test_orientation_is_respected(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(str(tmp_path / "turned.jpg")).size == (2, 4)
    assert open_image(Image.new("RGB", (4, 2))).size == (4, 2)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_opened_picture_is_not_opened_again(suffix: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / f"turned.{suffix}", exif=exif)
    opened = open_image(tmp_path / f"turned.{suffix}")
    assert open_image(opened) is opened


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="is a folder"):
        open_image(tmp_path)


def test_what_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    for content in (b"not a picture", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a picture"):
            open_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_a_truncated_picture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"truncated or damaged|not a picture"):
        open_image(path)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(DataError, match="9000x9000 pixels"):
        open_image(path)
    Image.new("1", (20000, 20000)).save(path)
    with pytest.raises(DataError, match="Scale it down"):
        open_image(path)
    with pytest.raises(DataError, match="at most 10 pixels"):
        open_image(Image.new("RGB", (4, 4)), most_pixels=10)
