"""Mean and standard deviation of the pixels of a source, by channel, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from poa.data.loader import looked_at
from poa.data.sources import ImageSource
from poa.errors import InputError


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and std of each channel, in 0..1; every image counts alike, whatever its size.

    `images` could be read; `unreadable` are messages about the others.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    unreadable: list[str]


def pixel_statistics(source: ImageSource, canvas: int, workers: int) -> PixelStatistics:
    """Read every image of a source once, by so many decoding processes, shrunk to fit `canvas` pixels
    squared. Raises InputError: no image can be read."""
    sums, images, unreadable = np.zeros((2, source.channels)), 0, list[str]()
    for batch in looked_at(source, partial(_moments, source, canvas), workers):
        moments = [look.image for look in batch if look.image is not None]
        sums += sum(moments)
        images += len(moments)
        unreadable += sum((look.unreadable for look in batch), [])
    if not images:
        raise InputError(f"data: expected readable images, got none of {len(source)}: {unreadable[0]}")
    mean, squares = sums / images
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    return PixelStatistics(tuple(mean.tolist()), tuple(std.tolist()), images, unreadable)


def _moments(source: ImageSource, canvas: int, index: int) -> np.ndarray:
    """Means of the pixels of an image and of their squares, float64 `[2, channels]`."""
    pixels = source.read(index, canvas).astype(np.float64) / 255
    return np.stack([pixels.mean((0, 1)), (pixels**2).mean((0, 1))])
