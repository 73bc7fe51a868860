"""Opening the pictures that rows refer to: paths, data URLs, bytes, and addresses if allowed."""

from __future__ import annotations

import base64
import binascii
import urllib.request
from pathlib import Path

from PIL import Image

from trol.data.damage import RowError
from trol.data.images import open_image
from trol.errors import DataError

MOST_BYTES = 50_000_000
"""Bytes that are taken from an address at most."""

PATIENCE = 20
"""Seconds that an address has to answer."""


def open_picture(reference: str | bytes, root: Path, *, allow_urls: bool = False) -> Image.Image:
    """The picture as upright RGB; a relative path begins at `root`.

    `RowError` (`image_missing`, `image_unreadable`, `image_url`) where there is none.
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
        there = path.exists()
    except (OSError, ValueError) as odd:  # too long for a path, or with a zero byte
        raise RowError("image_missing", f"{reference[:60]!r} is no path: {odd}.") from odd
    if not there:
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
        with urllib.request.urlopen(reference, timeout=PATIENCE) as answer:
            fetched = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError) as failed:  # URLError and timeouts are OSErrors
        raise RowError("image_url", f"{reference} does not answer: {failed}.") from failed
    if len(fetched) > MOST_BYTES:
        raise RowError("image_url", f"{reference} is larger than {MOST_BYTES:,} bytes.")
    return fetched
