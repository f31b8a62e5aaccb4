"""Mean and standard deviation of the pixels of a source, by channel, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from poa.data.decode import ImageError
from poa.data.loader import batches_of
from poa.data.sources import ImageSource
from poa.errors import InputError

Moments = tuple[np.ndarray, str | None]


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and std of each channel, in 0..1; every image counts alike, whatever its size.

    `images` could be read; `unreadable` are messages about the others.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    unreadable: list[str]


class _Moments(Dataset[Moments]):
    """Means of pixels and of their squares, float64 `[2, channels]`, of one image; or why it has none."""

    def __init__(self, source: ImageSource, canvas: int):
        self.source = source
        self.canvas = canvas

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Moments:
        try:
            pixels = self.source.read(index, self.canvas).astype(np.float64) / 255
            return np.stack([pixels.mean((0, 1)), (pixels**2).mean((0, 1))]), None
        except ImageError as error:
            return np.zeros((2, self.source.channels)), str(error)


def pixel_statistics(source: ImageSource, canvas: int, workers: int) -> PixelStatistics:
    """Read every image of a source once, by so many decoding processes, shrunk to fit `canvas` pixels
    squared. Raises InputError: no image can be read."""
    sums, images, unreadable = np.zeros((2, source.channels)), 0, list[str]()
    with tqdm(total=len(source), desc="images", unit="image", leave=False, disable=None) as bar:
        batches = batches_of(_Moments(source, canvas), workers, collate=list[Moments], batch_size=64)
        for batch in batches:
            messages = [message for _, message in batch if message is not None]
            sums += sum(moments for moments, _ in batch)
            images += len(batch) - len(messages)
            unreadable += messages
            bar.update(len(batch))
    if not images:
        raise InputError(f"data: expected readable images, got none of {len(source)}: {unreadable[0]}")
    mean, squares = sums / images
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    return PixelStatistics(tuple(mean.tolist()), tuple(std.tolist()), images, unreadable)
