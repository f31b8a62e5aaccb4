"""Decoding of image files of any kind into 8-bit RGB of a bounded size."""

from __future__ import annotations

import warnings
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Those that Pillow decodes by itself; others would start programs, as PostScript does Ghostscript.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "DIB", "QOI", "PSD", "SGI"),
    *("DDS", "PCX", "ICO", "TGA"),
)


@cache
def formats() -> tuple[str, ...]:
    """Those that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


def decode(file: BinaryIO, canvas: int) -> np.ndarray:
    """One image as uint8 `[H, W, 3]`, shrunk (aspect kept) to fit a square of `canvas` pixels.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is dropped; of an animation the first
    picture is taken. JPEGs are decoded at the smallest size that serves.

    Raises:
        Exception: of many kinds; the file is damaged, empty, no image, or larger than Pillow's limit against
            decompression bombs (89 million pixels).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=formats())
        except UnidentifiedImageError:  # its text would show a Python object
            raise ValueError(
                "the file is empty" if not file.seek(0, 2) else "no known kind of image"
            ) from None
        with image:
            image.draft("RGB", (canvas, canvas))
            rgb = _rgb(image)
    if max(rgb.size) > canvas:
        rgb.thumbnail((canvas, canvas), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; Pillow itself would clip what has more than 8 bits."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of an unknown range")
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        grey = deep if deep.max(initial=0) < 256 else deep.clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
