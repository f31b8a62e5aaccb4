"""The images of a run: training images and those held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from poa.data.decode import ImageError, decode_sized, to_pixels
from poa.data.layout import SOURCES, Openers, find
from poa.data.storage import Opened, Storage
from poa.data.summary import EXAMPLES, LeftOut, printable
from poa.errors import DataError, InputError
from poa.options import Options, option
from poa.random import stream_seed


@dataclass(frozen=True)
class DataConfig(Options, at="data"):
    """Which images are trained on, and which are held out."""

    source: str = option("digits", SOURCES)
    holdout: float = option(0.25, "share of each class held out if there is no test split; 0: none", "[0, 1)")
    unreadable_share: float = option(0.01, "largest unreadable share of images, or of shards", "[0, 1]")
    bits: int | None = option(
        None, "significant bits of pixels that have more than 8; none: as many as each image needs", "[8, 32]"
    )

    def check(self) -> None:
        if not self.source.strip():
            raise self.wrong("source", "digits, or where the images are")

    def open(self, seed: int, openers: Openers | None = None, channels: int = 3) -> DataSplit:
        """`open_data` of these options, as images of so many channels."""
        data = open_data(self.source, self.holdout, seed, self.unreadable_share, openers)
        train, test = (
            part and replace(part, bits=self.bits, channels=channels) for part in (data.train, data.test)
        )
        assert train is not None
        return replace(data, train=train, test=test)


@dataclass(frozen=True)
class ImageSource:
    """Images, decoded when asked for.

    Attributes:
        storage: where they lie.
        positions: int64 `[images]`, which of the storage's.
        labels: int64 `[images]`, -1 where an image has none; or None.
        classes: names of the labels.
        bits: of pixels that have more than 8; None: as many as each image needs.
        channels: that they are read with.
    """

    storage: Storage
    positions: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    bits: int | None = None
    channels: int = 3

    @classmethod
    def whole(cls, opened: Opened) -> ImageSource:
        return cls(opened.images, np.arange(len(opened.images)), opened.labels, opened.classes)

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, index: int, canvas: int) -> np.ndarray:
        """One image as uint8 `[H, W, channels]`, shrunk (aspect kept) to fit a square of `canvas` pixels.
        Raises ImageError: it is not readable; the message names it."""
        return self.read_sized(index, canvas)[1]

    def read_sized(self, index: int, canvas: int) -> tuple[tuple[int, int], np.ndarray]:
        """(Height, width) of an image as it is stored, and what `read` gives."""
        position = int(self.positions[index])
        try:
            opened = self.storage.open(position)
            if isinstance(opened, np.ndarray):
                return opened.shape[:2], to_pixels(opened, canvas, self.bits, self.channels)
            if isinstance(opened, Image.Image):
                return (opened.height, opened.width), to_pixels(opened, canvas, self.bits, self.channels)
            with opened:
                return decode_sized(opened, canvas, self.bits, self.channels)
        except DataError:  # of a store that does not answer, which is no reason to train on other images
            raise
        except Exception as error:  # decoders raise whatever they like
            text = isinstance(error, OSError) and error.strerror or str(error)
            reason = " ".join(text.split()) or type(error).__name__
            raise ImageError(f"{self.storage.name(position)}: {reason}") from None

    def name(self, index: int) -> str:
        """What to call an image."""
        return self.storage.name(int(self.positions[index]))

    def label(self, index: int) -> str | None:
        """The name of its label, if it has one."""
        number = -1 if self.labels is None else int(self.labels[index])
        return self.classes[number] if number >= 0 else None

    def subset(self, indices: np.ndarray) -> ImageSource:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, positions=self.positions[indices], labels=labels)

    def labelled(self) -> ImageSource:
        if self.labels is None or (self.labels >= 0).all():
            return self
        return self.subset(np.flatnonzero(self.labels >= 0))


@dataclass(frozen=True)
class DataSplit:
    """Training images and images held out.

    Attributes:
        train: to train on; those with labels are the bank of k-NN.
        test: held out, all with labels; None where there is nothing to test with.
        lost: shards and folders that are missing, damaged or not readable.
        left_out: what is there and not used, by reason.
        labels_from: where labels come from.
        untested: why there are no images to test with.
    """

    train: ImageSource
    test: ImageSource | None
    lost: tuple[str, ...] = ()
    left_out: LeftOut = field(default_factory=LeftOut)
    labels_from: str = ""
    untested: str = ""

    def digest(self) -> str:
        """A checksum of names, order and labels of all images, wherever they lie."""
        digest = hashlib.sha256()
        for source in (self.train, self.test):
            if source is not None:
                labels = source.positions if source.labels is None else source.labels
                for part in (*source.storage.identity(), source.positions, labels):
                    digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]

    def untaught(self) -> str:
        """How many held-out images are of classes that no training image has, in words; nothing if none."""
        if self.test is None or self.train.labels is None or self.test.labels is None:
            return ""
        lacks = ~np.isin(self.test.labels, self.train.labels)
        if not lacks.any():
            return ""
        missing = [printable(self.test.classes[i]) for i in np.unique(self.test.labels[lacks]).tolist()]
        names = ", ".join([*missing[:EXAMPLES], *["..."] * (len(missing) > EXAMPLES)])
        counts = f"{lacks.sum():,} of {len(lacks):,} held-out images"
        return f"{counts} are of classes without training images ({names})"


def open_data(
    name: str, holdout: float, seed: int, lost_share: float = 0.0, openers: Openers | None = None
) -> DataSplit:
    """Open images by the name of where they are.

    - `digits`;
    - a folder with `train/` and maybe `val/`, `validation/` or `test/`, each of them one of the following;
    - a folder of class folders, or of just images, which have no labels, as those beside class folders;
    - a folder of tar shards in WebDataset layout or of Parquet tables (Hugging Face's datasets, say), split
      by their names where some begin with `train` and some with `val`, `validation` or `test`;
    - shards or tables by pattern: `path/train-{0000..0099}.tar`, `path/*.parquet`;
    - a list, `path/images.txt`: a path a line, relative to the list, and maybe a label after a tab.

    Where there are labels of several classes but no test images, a share of every class is held out. An image
    without a label is trained on, and not tested with.

    Args:
        name: see above.
        holdout: share held out; 0: all images are trained on.
        seed: of the choice of held-out images.
        lost_share: share of shards or folders that may be missing, damaged or not readable.
        openers: how to open them, where no name says it; see `poa.data.layout.find_datasets`.

    Raises:
        InputError: nothing there, no images in it, or too much is lost.
    """
    opened, lost, left_out = open_parts(name, lost_share, openers)
    train, test, why = _split(opened, holdout, seed, name, left_out)
    return DataSplit(train, test, lost, left_out, opened[0].labels_from if train.classes else "", why)


def open_parts(
    name: str, lost_share: float = 0.0, openers: Openers | None = None
) -> tuple[list[Opened], tuple[str, ...], LeftOut]:
    """The training images and, where there are any, those to test with; what is lost; what is left out.

    The arguments are those of `open_data`.
    """
    try:
        layout = openers or find(name)
        train = layout.train()
        test = layout.test() if layout.test else train.test
        opened = [train, *([test] if test else [])]
    except DataError:
        raise
    except OSError as error:
        raise InputError(f"data: expected images that can be read in {name}, got: {error}") from None
    lost = tuple(line for part in opened for line in part.lost)
    parts = sum(part.parts for part in opened)
    if len(lost) > lost_share * parts:
        shown = "; ".join(lost[:EXAMPLES]) + "; ..." * (len(lost) > EXAMPLES)
        raise InputError(
            f"data: expected whole shards and readable folders, got {len(lost)} of {parts} missing or "
            f"damaged ({shown}); data.unreadable_share allows a share of them"
        )
    left_out = LeftOut()
    for counts in (layout.left_out, *(part.left_out for part in opened)):
        left_out.update_from(counts)
    return opened, lost, left_out


def _split(
    opened: Sequence[Opened], holdout: float, seed: int, name: str, left_out: LeftOut
) -> tuple[ImageSource, ImageSource | None, str]:
    """Training and test images, and why there are no test images."""
    images = opened[0]
    source = ImageSource.whole(images)
    used = [] if images.labels is None else np.unique(images.labels[images.labels >= 0]).tolist()
    if len(used) < 2:
        why = f"one class alone: {printable(images.classes[used[0]])}" if used else "no labels"
        source = replace(source, labels=None, classes=())
    elif len(opened) == 1:
        return _hold_out(source, holdout, seed)
    else:
        test = _test_images(opened[1], images.classes, name, left_out)
        if test is not None:
            return replace(source, classes=test.classes), test, ""
        why = "the test images have no labels"
    for unused in opened[1:]:
        left_out.add("test images, unused", unused.images.name(0), len(unused.images))
    return source, None, why


def _test_images(
    opened: Opened, classes: tuple[str, ...], name: str, left_out: LeftOut
) -> ImageSource | None:
    """Those that have a label, numbered as in training. Numbered classes may be others than to train on."""
    if opened.labels is None:
        return None
    known = set(classes)
    unknown = [label for label in opened.classes if label not in known]
    if unknown and not all(map(str.isdecimal, (*classes, *unknown))):
        raise InputError(
            f"data: expected the same classes in training and test images of {name}, got {len(unknown)} "
            f"of test images alone: {', '.join(map(printable, unknown[:EXAMPLES]))}"
        )
    joined = (*classes, *unknown)
    number = {label: i for i, label in enumerate(joined)}
    labels = np.array([*(number[label] for label in opened.classes), -1])[opened.labels]
    source = ImageSource(opened.images, np.arange(len(labels)), labels, joined)
    if nameless := int((labels < 0).sum()):
        first = opened.images.name(int(np.flatnonzero(labels < 0)[0]))
        left_out.add("test images without a label", first, nameless)
    return source.labelled()


def _hold_out(source: ImageSource, share: float, seed: int) -> tuple[ImageSource, ImageSource | None, str]:
    """Hold out a share of every class, at least one image of it but not the only one."""
    if not share:
        return source, None, "data.holdout=0"
    assert source.labels is not None
    draw = np.random.default_rng(stream_seed(seed, "holdout"))
    held: list[int] = []
    for label in range(len(source.classes)):
        members = draw.permutation(np.flatnonzero(source.labels == label))
        held += members[: min(max(round(share * len(members)), 1), len(members) - 1)].tolist()
    if not held:
        return source, None, "one image in each class"
    test = np.sort(np.array(held, dtype=np.int64))
    train = np.setdiff1d(np.arange(len(source)), test)
    return source.subset(train), source.subset(test), ""
