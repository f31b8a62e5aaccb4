"""The images of a run: those to train on and those held out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from poa.data.decode import ImageError, decode
from poa.data.layout import find
from poa.data.storage import Opened, Storage, load_digits
from poa.errors import InputError
from poa.random import stream_seed


@dataclass(frozen=True)
class ImageSource:
    """Images, decoded when asked for.

    Attributes:
        storage: where they lie.
        positions: int64 `[images]`, which of the storage's.
        labels: int64 `[images]`, or None where there are none.
        classes: names of the labels.
    """

    storage: Storage
    positions: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]

    @classmethod
    def whole(cls, opened: Opened) -> ImageSource:
        return cls(opened.images, np.arange(len(opened.images)), opened.labels, opened.classes)

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, index: int, canvas: int) -> np.ndarray:
        """One image as uint8 `[H, W, 3]`, shrunk (aspect kept) to fit a square of `canvas` pixels.

        Raises:
            ImageError: it is not readable; the message names it.
        """
        position = int(self.positions[index])
        try:
            found = self.storage.open(position)
            if isinstance(found, np.ndarray):
                return found
            with found:
                return decode(found, canvas)
        except Exception as error:  # decoders raise whatever they like
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{self.storage.name(position)}: {reason}") from None

    def subset(self, indices: np.ndarray) -> ImageSource:
        """The images at these positions."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageSource(self.storage, self.positions[indices], labels, self.classes)


@dataclass(frozen=True)
class DataSplit:
    """Images to train on and images held out.

    Attributes:
        train: to train on; the bank of k-NN.
        test: held out; None where nothing has labels to test with.
        lost: shards that are missing or damaged.
    """

    train: ImageSource
    test: ImageSource | None
    lost: tuple[str, ...] = field(default=())


def open_data(name: str, holdout: float, seed: int, lost_share: float = 0.0) -> DataSplit:
    """Open images by the name of where they are.

    - `digits`;
    - a folder with `train/` and maybe `val/`, `validation/` or `test/`, each of them one of the following;
    - a folder of class folders, or of just images, which have no labels;
    - a folder of tar shards in WebDataset layout or of Parquet tables (Hugging Face's datasets, say), split
      by their names where some begin with `train` and some with `val`, `validation` or `test`;
    - shards or tables by pattern: `path/train-{0000..0099}.tar`, `path/*.parquet`;
    - a list, `path/images.txt`: a path a line, relative to the list, and maybe a label after a tab.

    Where there are labels but no test images, a share of every class is held out.

    Args:
        name: see above.
        holdout: share held out.
        seed: of the choice of held-out images.
        lost_share: share of shards that may be missing or damaged.

    Raises:
        InputError: nothing there, no images in it, or too many lost shards.
    """
    if name == "digits":
        return _hold_out(ImageSource.whole(load_digits()), holdout, seed)
    train, test = find(name)
    opened = [train(), *([test()] if test else [])]
    lost = tuple(line for part in opened for line in part.lost)
    shards = sum(part.shards for part in opened)
    if len(lost) > lost_share * shards:
        raise InputError(
            f"data: expected whole shards, got {len(lost)} of {shards} missing or damaged "
            f"({'; '.join(lost)}); run.unreadable_share allows a share of them"
        )
    if len(opened) == 1:
        split = _hold_out(ImageSource.whole(opened[0]), holdout, seed)
        return DataSplit(split.train, split.test, lost)
    images, held_out = map(ImageSource.whole, opened)
    if images.labels is None or held_out.labels is None:
        return DataSplit(images, None, lost)
    _require_same_classes(images.classes, held_out.classes, name)
    return DataSplit(images, held_out, lost)


def _require_same_classes(train: tuple[str, ...], test: tuple[str, ...], name: str) -> None:
    """Numbered classes may lack the last ones on one side."""
    common = min(len(train), len(test))
    numbered = all(label == str(number) for number, label in enumerate(train + test[len(train) :]))
    if train[:common] != test[:common] or (len(train) != len(test) and not numbered):
        raise InputError(
            f"data: expected the same classes to train and to test on in {name}, "
            f"got {len(train)} and {len(test)} classes or other names"
        )


def _hold_out(source: ImageSource, share: float, seed: int) -> DataSplit:
    """Hold out a share of every class, at least one image of it; nothing without labels."""
    if source.labels is None:
        return DataSplit(source, None)
    draw = np.random.default_rng(stream_seed(seed, "holdout"))
    held: list[int] = []
    for label in range(len(source.classes)):
        members = draw.permutation(np.flatnonzero(source.labels == label))
        held += members[: max(round(share * len(members)), 1)].tolist()
    test = np.sort(np.array(held, dtype=np.int64))
    train = np.setdiff1d(np.arange(len(source)), test)
    if not len(train):
        raise InputError(
            f"data: expected images left to train on, got {len(source)} images and holdout {share}"
        )
    return DataSplit(source.subset(train), source.subset(test))
