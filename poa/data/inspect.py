"""Looking at every image of a source: its size, whether it can be read, and a perceptual hash.

The hash is pHash: 64 bits, the signs of the 8 x 8 lowest coefficients of a cosine transform of the grey image
of 32 x 32 pixels, about their median. Copies that were scaled, recompressed or recoloured differ in few bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from PIL import Image

from poa.data.decode import to_picture
from poa.data.loader import looked_at
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


def inspect(source: ImageSource, workers: int) -> Inspection:
    """Read every image of a source, by so many decoding processes."""
    readable, sizes, hashes, messages = [], [], [], list[str]()
    for batch in looked_at(source, partial(_look, source), workers):
        good = [look for look in batch if look.image is not None]
        readable += [look.position for look in good]
        sizes.append(np.array([look.image[0] for look in good], dtype=np.int64).reshape(-1, 2))
        hashes.append(np.array([look.image[1] for look in good], dtype=np.uint64))
        messages += sum((look.unreadable for look in batch), [])
    kept = source.subset(np.array(readable, dtype=np.int64))
    return Inspection(kept, np.concatenate(sizes), np.concatenate(hashes), messages)


def _look(source: ImageSource, index: int) -> tuple[tuple[int, int], int]:
    """The size of an image and its hash."""
    size, pixels = source.read_sized(index, CANVAS)
    return size, perceptual_hash(pixels)


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
