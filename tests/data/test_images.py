"""Pictures: RGB and upright, or one clear error."""

from pathlib import Path

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


def test_orientation_is_respected(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(str(tmp_path / "turned.jpg")).size == (2, 4)
    assert open_image(Image.new("RGB", (4, 2))).size == (4, 2)


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
