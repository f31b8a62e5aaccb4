"""From any image file to 8-bit pixels of a bounded size: the same for training, evaluation and use."""

from __future__ import annotations

import warnings
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

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


NUMPY = b"\x93NUMPY"  # how a file of an array begins


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


@cache
def formats() -> tuple[str, ...]:
    """Those that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: BinaryIO, canvas: int, bits: int | None = None, channels: int = 3) -> np.ndarray:
    """The picture in a file, as `to_pixels` makes it; see `decode_sized`."""
    return decode_sized(file, canvas, bits, channels)[1]


def decode_sized(
    file: BinaryIO, canvas: int, bits: int | None = None, channels: int = 3
) -> tuple[tuple[int, int], np.ndarray]:
    """(Height, width) of the picture in a file, or of an array of NumPy, and what `to_pixels` makes of it.

    JPEGs are decoded at the smallest size that serves. Raises Exception: of many kinds; the file is damaged,
    cut off, empty, no image, or larger than Pillow's limit against decompression bombs (89 million pixels).
    """
    begins = file.read(len(NUMPY))
    file.seek(0)
    if begins == NUMPY:
        array = np.load(file, allow_pickle=False)
        return array.shape[:2], to_pixels(array, canvas, bits, channels)
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
            image.draft("RGB" if channels == 3 else None, (canvas, canvas))
            return size, to_pixels(image, canvas, bits, channels)


def to_pixels(
    image: Image.Image | np.ndarray, canvas: int, bits: int | None = None, channels: int = 3
) -> np.ndarray:
    """A picture as uint8 `[H, W, channels]`, upright, shrunk (aspect kept) to fit `canvas` pixels squared.

    Of three channels: grey, palette, CMYK and deeper images become 8-bit RGB, these by `_eight_bits`;
    transparency is dropped; of an animation the first picture is taken. Of another number: a picture has as
    many bands, or a TIFF as many pages, or an array is `[H, W]` or `[H, W, channels]`; transparency beside
    one grey band is dropped. EXIF says what is upright.

    Raises:
        ValueError: pixels are floating-point numbers, or have another number of channels.
        Exception: what reads the file raises.
    """
    if isinstance(image, np.ndarray):
        planes, turn = _array_planes(image, bits, channels), None
    else:
        planes = [_rgb(image, bits)] if channels == 3 else _planes(image, bits, channels)
        turn = UPRIGHT.get(_orientation(image))
    for number, plane in enumerate(planes):
        planes[number] = plane = plane if turn is None else plane.transpose(turn)
        if max(plane.size) > canvas:
            plane.thumbnail((canvas, canvas), Image.Resampling.BICUBIC)
    arrays = [np.asarray(plane) for plane in planes]
    return arrays[0] if arrays[0].ndim == 3 else np.stack(arrays, 2)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Pixels `[H, W, channels]` to look at: RGB, or the mean of other than three channels in grey."""
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.mean(2).round().astype(np.uint8))


def _planes(image: Image.Image, bits: int | None, channels: int) -> list[Image.Image]:
    """The bands or pages of a picture, each in 8-bit grey; see `to_pixels`."""
    bands = len(image.getbands())
    if image.format == "TIFF" and bands == 1 and getattr(image, "n_frames", 1) == channels > 1:
        pages = [np.asarray(page) for page in ImageSequence.Iterator(image)]
        image.seek(0)
        return _array_planes(np.dstack(pages), bits, channels)
    if image.mode == "F" or image.mode.startswith("I"):
        return _array_planes(np.asarray(image), bits, channels)
    if image.mode == "LA" and channels == 1:
        image = image.getchannel("L")
    elif image.mode in ("1", "P", "PA"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    planes = list(image.split())
    if len(planes) != channels:
        raise ValueError(f"expected an image of channels={channels}, got {len(planes)} ({image.mode})")
    return planes


def _array_planes(pixels: np.ndarray, bits: int | None, channels: int) -> list[Image.Image]:
    """The channels of an array, each in 8-bit grey; one is repeated where three are wanted."""
    if pixels.dtype.kind not in "iu" or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"expected integers [H, W] or [H, W, channels], got {got}")
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    pixels = np.repeat(pixels, 3, 2) if (pixels.shape[2], channels) == (1, 3) else pixels
    if pixels.shape[2] != channels:
        raise ValueError(f"expected an array [H, W, {channels}], got {list(pixels.shape)}")
    pixels = pixels if pixels.dtype == np.uint8 else _eight_bits(pixels, bits)
    return [Image.fromarray(np.ascontiguousarray(pixels[..., channel])) for channel in range(channels)]


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
