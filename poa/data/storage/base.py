"""What every kind of storage offers: encoded images by position, and what is known of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Storage(Protocol):
    """Encoded images by position."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in messages."""

    def open(self, index: int) -> BinaryIO | np.ndarray:
        """An encoded image, or decoded pixels uint8 `[H, W, 3]`."""


class Strings(Sequence[str]):
    """Many strings in one array of bytes."""

    def __init__(self, values: Iterable[str]):
        encoded = [os.fsencode(value) for value in values]
        self.ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.bytes[start : int(self.ends[index])].tobytes())


@dataclass(frozen=True)
class Opened:
    """A storage with what is known of its images.

    Attributes:
        images: the storage.
        labels: int64 `[images]`, or None.
        classes: names of the labels.
        lost: shards that are missing or damaged, and how.
        shards: how many there should be.
    """

    images: Storage
    labels: np.ndarray | None
    classes: tuple[str, ...]
    lost: tuple[str, ...] = ()
    shards: int = 1
