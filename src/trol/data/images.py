"""Opening pictures: always RGB, upright, decoded, and never larger than the limit.

Grey pictures of more than 8 bits (scans, X-rays, depth maps: integers of 16 or 32, or floats)
rarely fill what their type can hold, so their darkest value becomes black and their brightest
white, as viewers show them. Transparent pixels become white. Rows of data refer to pictures by
path, data URL, bytes, or, if allowed, address.
"""

import base64
import binascii
import urllib.request
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from trol.data.formats import RowError
from trol.errors import DataError

IMAGE_TOKEN = "<image>"
"""Stands for one image in every text and template of a TroL model, whatever the tokenizer's image
token is."""

MOST_PIXELS = 50_000_000
"""Largest width x height that is decoded (150 MB as RGB)."""

MOST_BYTES = 50_000_000
"""Most bytes that are downloaded from an address."""

PATIENCE = 20
"""Seconds that an address has to answer."""

DEEP = ("I", "F")
"""First letters of the modes of grey pictures with more than 8 bits: I, I;16, I;16B, F ..."""


def open_image(
    source: str | Path | bytes | Image.Image, *, most_pixels: int = MOST_PIXELS
) -> Image.Image:
    """The picture of a path, or of a file's bytes, as upright RGB (EXIF applied), fully decoded.

    A picture that was opened already is returned itself. The size is read from the header, before
    anything is decoded.

    Raises:
        DataError: a missing file, a file that is no picture, a truncated picture, or one of more
            than `most_pixels` pixels.
    """
    if isinstance(source, Image.Image):
        return _upright(source, "the given picture", most_pixels)
    if isinstance(source, bytes):
        return _decoded(BytesIO(source), f"the picture of {len(source):,} bytes", most_pixels)
    path = Path(source)
    if not path.exists():
        raise DataError(f"no picture at {path}: there is no such file; check the path.")
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a picture; name one picture file in it.")
    return _decoded(path, str(path), most_pixels)


def _decoded(file: Path | BytesIO, name: str, most_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                return _upright(picture, name, most_pixels)
    except Image.DecompressionBombError as bomb:
        raise _too_large(name, "more pixels than Pillow opens", most_pixels) from bomb
    except UnidentifiedImageError as unread:
        raise DataError(
            f"{name} is not a picture that Pillow can read; give a PNG, JPEG, WebP, GIF or BMP."
        ) from unread
    except PermissionError as denied:
        raise DataError(f"{name} may not be read by this user; change its permissions.") from denied
    except OSError as broken:
        raise _broken(name, broken) from broken


def _upright(picture: Image.Image, name: str, most_pixels: int) -> Image.Image:
    width, height = picture.size
    if width * height > most_pixels:
        raise _too_large(name, f"{width}x{height} pixels", most_pixels)
    if _is_opened(picture):
        return picture
    try:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith(DEEP):
            return _stretched(upright, name).convert("RGB")
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            return Image.alpha_composite(white, upright).convert("RGB")
        return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as broken:
        raise _broken(name, broken) from broken


def _is_opened(picture: Image.Image) -> bool:
    """Whether this is what `open_image` gives: in memory, RGB, opaque and upright."""
    if type(picture) is not Image.Image or picture.mode != "RGB" or picture.has_transparency_data:
        return False
    return picture.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _stretched(picture: Image.Image, name: str) -> Image.Image:
    """Grey of 8 bits, the darkest value 0 and the brightest 255; NaNs are black.

    A picture of one value is black if that is at most 0, else white.
    """
    values = np.asarray(picture).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise DataError(f"{name} holds no finite number; save it again.")
    low, high = finite.min(), finite.max()
    if low == high:
        low, high = low - (low > 0), high + (low <= 0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return Image.fromarray(((values - low) / (high - low) * 255).round().astype(np.uint8))


def _broken(name: str, cause: Exception) -> DataError:
    return DataError(f"{name} is truncated or damaged ({cause}); save or download it again.")


def _too_large(name: str, got: str, most_pixels: int) -> DataError:
    return DataError(
        f"{name} has {got}; at most {most_pixels:,} pixels are opened. Scale it down first."
    )


def open_picture(reference: str | bytes, root: Path, *, allow_urls: bool = False) -> Image.Image:
    """The picture as upright RGB; a relative path begins at `root`.

    Raises:
        RowError: there is none (`image_missing`, `image_unreadable`, `image_url`).
    """
    if isinstance(reference, str):
        reference = _located(reference, root, allow_urls)
    try:
        return open_image(reference)
    except DataError as damaged:
        raise RowError("image_unreadable", str(damaged)) from damaged


def _located(reference: str, root: Path, allow_urls: bool) -> str | bytes:
    """An existing path, or the bytes that the reference holds or leads to."""
    if reference.startswith("data:"):
        return _inlined(reference)
    if reference.startswith(("http://", "https://")):
        return _fetched(reference, allow_urls)
    path = root / reference
    try:
        exists = path.exists()
    except (OSError, ValueError) as odd:  # too long for a path, or with a zero byte
        raise RowError("image_missing", f"{reference[:60]!r} is no path: {odd}.") from odd
    if not exists:
        raise RowError(
            "image_missing",
            f"no picture at {path}: there is no such file; check `images`, the folder that the "
            "paths of the source begin at.",
        )
    return str(path)


def _inlined(reference: str) -> bytes:
    head, _, body = reference.partition(",")
    if not head.endswith(";base64"):
        raise RowError("image_unreadable", f"the data URL {head[:60]!r} is not base64; encode it.")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as broken:
        raise RowError("image_unreadable", f"the data URL is broken base64 ({broken}).") from broken


def _fetched(reference: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise RowError(
            "image_url",
            f"the image lies at {reference}, and nothing is fetched while training; download it, "
            "or set `allow_urls: true` for the source.",
        )
    try:
        with urllib.request.urlopen(reference, timeout=PATIENCE) as response:
            content = response.read(MOST_BYTES + 1)
    except (OSError, ValueError) as failed:  # URLError and timeouts are OSErrors
        raise RowError("image_url", f"{reference} does not answer: {failed}.") from failed
    if len(content) > MOST_BYTES:
        raise RowError("image_url", f"{reference} is larger than {MOST_BYTES:,} bytes.")
    return content
