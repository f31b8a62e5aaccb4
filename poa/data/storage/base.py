"""What every kind of storage offers: encoded images by position, and what is known of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from poa.data.summary import LeftOut

# Of the formats in `poa.data.decode`; of a sample's pictures with several endings, the first is taken.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".avifs", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".mpo", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".pfm", ".qoi", ".tga", ".icb", ".vda", ".vst", ".pcx", ".sgi", ".rgb", ".rgba", ".bw"),
    *(".ico", ".dds", ".psd"),
)
# Parts of names, of columns and of members of tar files, that a sample's photo does not have.
NO_PHOTO = re.compile(r"mask|seg|depth|annot|label|target|thumb|audio|sound|video", re.IGNORECASE)
SYSTEM = {"__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}


# Of splits: what folders, tables and members of tar files are called, or begin with.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "test", "testing")


class Storage(Protocol):
    """Encoded images by position."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in messages."""

    def open(self, index: int) -> BinaryIO | Image.Image | np.ndarray:
        """An encoded image, a picture, or pixels `[H, W]` or `[H, W, channels]`."""

    def identity(self) -> Iterable[bytes | np.ndarray]:
        """What the same images have in common, wherever they lie."""


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
        labels: int64 `[images]`, -1 where an image has none; or None.
        classes: names of the labels.
        labels_from: where they come from.
        left_out: what is not among the images, by reason.
        lost: shards or folders that are missing, damaged or not readable, and how.
        parts: how many shards or folders there should be.
        test: images to test with that lie in the same files.
    """

    images: Storage
    labels: np.ndarray | None
    classes: tuple[str, ...]
    labels_from: str = ""
    left_out: LeftOut = field(default_factory=LeftOut)
    lost: tuple[str, ...] = ()
    parts: int = 1
    test: Opened | None = None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: `.x`, or what systems put beside."""
    return name.startswith(".") or name in SYSTEM


def is_label(name: str) -> bool:
    """Whether a label says something: an empty one or a negative number does not."""
    return bool(name) and not re.fullmatch(r"-\d+", name)


def join_labels(
    parts: Sequence[tuple[np.ndarray, Sequence[str]]], classes: Sequence[str] | None = None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int64 `[images]`, or None where no image has one, and their names, default sorted, numbers as
    numbers; of several files, each of which numbers (int64 `[images]`, -1 for none) the names of its own."""
    if classes is None:
        names = {name for _, own in parts for name in own if is_label(name)}
        classes = sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names)
    number = {name: i for i, name in enumerate(classes)}
    joined = [np.array([*(number.get(name, -1) for name in own), -1])[codes] for codes, own in parts]
    labels = np.concatenate(joined).astype(np.int64) if joined else np.zeros(0, dtype=np.int64)
    return (labels, tuple(classes)) if (labels >= 0).any() else (None, ())
