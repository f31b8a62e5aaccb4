"""Looking at every image of a source: its size, whether it can be read, and a perceptual hash.

The hash is pHash: 64 bits, the signs of the 8 x 8 lowest coefficients of a cosine transform of the grey image
of 32 x 32 pixels, about their median. Copies that were scaled, recompressed or recoloured differ in few bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from poa.data.decode import ImageError, to_picture
from poa.data.loader import batches_of
from poa.data.sources import ImageSource

CANVAS = 64  # pixels; enough for the hash, and quickly decoded
SIDE, KEPT = 32, 8  # pixels of a hashed image, frequencies along each axis
CHUNK = 1 << 24  # pairs of hashes compared at a time


@dataclass(frozen=True)
class Inspection:
    """What there is to know of a source without a network.

    Attributes:
        source: of the images that can be read.
        sizes: int64 `[images, 2]`, their (height, width) as they are stored.
        hashes: uint64 `[images]`.
        unreadable: messages about the others.
    """

    source: ImageSource
    sizes: np.ndarray
    hashes: np.ndarray
    unreadable: list[str]


class _Look(NamedTuple):
    size: tuple[int, int]
    hash: int
    unreadable: str | None


class _Looks(Dataset[_Look]):
    def __init__(self, source: ImageSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Look:
        try:
            size, pixels = self.source.read_sized(index, CANVAS)
            return _Look(size, perceptual_hash(pixels), None)
        except ImageError as error:
            return _Look((0, 0), 0, str(error))


def _arrays(looks: Sequence[_Look]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Which of a batch can be read, their sizes and hashes; messages about the others."""
    good = [look for look in looks if look.unreadable is None]
    return (
        np.array([look.unreadable is None for look in looks]),
        np.array([look.size for look in good], dtype=np.int64).reshape(-1, 2),
        np.array([look.hash for look in good], dtype=np.uint64),
        [look.unreadable for look in looks if look.unreadable is not None],
    )


def inspect(source: ImageSource, workers: int) -> Inspection:
    """Read every image of a source, by so many decoding processes."""
    bar = tqdm(total=len(source), desc="images", unit="image", leave=False, disable=None)
    batches = []
    for batch in batches_of(_Looks(source), workers, collate=_arrays, batch_size=64):
        batches.append(batch)
        bar.update(len(batch[0]))
    bar.close()
    readable, sizes, hashes, messages = zip(*batches, strict=True)
    kept = source.subset(np.flatnonzero(np.concatenate(readable)))
    return Inspection(kept, np.concatenate(sizes), np.concatenate(hashes), sum(messages, []))


@cache
def _cosines() -> np.ndarray:
    """The lowest rows of the cosine transform (DCT-II), `[KEPT, SIDE]`."""
    return np.cos(np.pi / SIDE * np.outer(np.arange(KEPT), np.arange(SIDE) + 0.5))


def perceptual_hash(pixels: np.ndarray) -> int:
    """The 64 bits of an image, uint8 `[H, W, C]`; see the top of this file."""
    grey = to_picture(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    waves = (_cosines() @ np.asarray(grey, dtype=np.float64) @ _cosines().T).ravel().round(6)
    bits = waves > np.median(waves[1:])  # the first is the brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def nearest_hashes(queries: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each hash of the queries, uint64 `[N]`, the bits in which the nearest of the bank `[M]`, M at least
    1, differs, and its position."""
    bits, positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    step = max(CHUNK // len(bank), 1)
    for start in range(0, len(queries), step):
        different = np.bitwise_count(queries[start : start + step, None] ^ bank)
        positions.append(different.argmin(1))
        bits.append(different.min(1).astype(np.int64))
    return np.concatenate(bits), np.concatenate(positions)


def class_sizes(source: ImageSource) -> list[tuple[str, int]]:
    """Names and numbers of images of the classes that have any, smallest first."""
    if source.labels is None:
        return []
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return sorted(((n, int(c)) for n, c in zip(source.classes, counts, strict=True) if c), key=lambda x: x[1])
