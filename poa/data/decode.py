"""From any image file to 8-bit RGB of a bounded size: the same for training, evaluation and use."""

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
ORIENTATION = 0x0112  # of EXIF; what makes a picture upright, by its value
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


@cache
def formats() -> tuple[str, ...]:
    """Those that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: BinaryIO, canvas: int, bits: int | None = None) -> np.ndarray:
    """The picture in a file, as `to_pixels` makes it; see `decode_sized`."""
    return decode_sized(file, canvas, bits)[1]


def decode_sized(file: BinaryIO, canvas: int, bits: int | None = None) -> tuple[tuple[int, int], np.ndarray]:
    """(Height, width) of the picture in a file, and the picture as `to_pixels` makes it.

    JPEGs are decoded at the smallest size that serves.

    Raises:
        Exception: of many kinds; the file is damaged, cut off, empty, no image, or larger than Pillow's limit
            against decompression bombs (89 million pixels).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about palettes and EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=formats())
        except UnidentifiedImageError:  # its text would show a Python object
            raise ValueError(
                "the file is empty" if not file.seek(0, 2) else "not an image of a known format"
            ) from None
        with image:
            size = image.height, image.width
            image.draft("RGB", (canvas, canvas))
            return size, to_pixels(image, canvas, bits)


def to_pixels(image: Image.Image, canvas: int, bits: int | None = None) -> np.ndarray:
    """A picture as uint8 `[H, W, 3]`, upright, shrunk (aspect kept) to fit a square of `canvas` pixels.

    Grey, palette, CMYK and deeper images become 8-bit RGB, these by `_eight_bits`; transparency is dropped;
    of an animation the first picture is taken; EXIF says what is upright.

    Raises:
        ValueError: pixels are floating-point numbers.
        Exception: what reads the file raises.
    """
    rgb = _rgb(image, bits)
    if (turn := UPRIGHT.get(_orientation(image))) is not None:
        rgb = rgb.transpose(turn)
    if max(rgb.size) > canvas:
        rgb.thumbnail((canvas, canvas), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of damaged EXIF; the pixels are whole
        return 1


def _rgb(image: Image.Image, bits: int | None) -> Image.Image:
    """A copy in 8-bit RGB; Pillow itself would clip what has more than 8 bits."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point values of unknown range")
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image), bits)).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray, bits: int | None) -> np.ndarray:
    """The upper 8 of the bits that pixels have.

    Without `bits`, those are the smallest even number, at least 8, that holds all values of the image: 12 for
    values up to 4095. Where some are negative, values are signed numbers of so many bits; zero becomes 128.
    """
    low, high = int(grey.min(initial=0)), int(grey.max(initial=0))
    if bits is None:
        needed = max(high.bit_length(), (-low - 1).bit_length()) + 1 if low < 0 else high.bit_length()
        bits = max(needed + needed % 2, 8)
    moved = grey.astype(np.int32 if grey.itemsize < 4 else np.int64) + (1 << bits - 1 if low < 0 else 0)
    return (moved.clip(0, (1 << bits) - 1) >> bits - 8).astype(np.uint8)
