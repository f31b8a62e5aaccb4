"""Where images come from: the built-in digits, folders, lists, tar shards, Parquet tables."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from poa.data.decode import ImageError, decode
from poa.data.storage import EXTENSIONS, Arrays, Files, Opened, Storage, open_parquet, open_shards
from poa.errors import InputError
from poa.random import stream_seed

TRAIN_NAMES = ("train",)
TEST_NAMES = ("val", "validation", "test")
PACKED: dict[str, Callable[[Sequence[Path]], Opened]] = {".tar": open_shards, ".parquet": open_parquet}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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
        return _hold_out(load_digits(), holdout, seed)
    train, test = _find(name)
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


Opener = Callable[[], Opened]


def _find(name: str) -> tuple[Opener, Opener | None]:
    """How to open the images to train and to test on."""
    root = Path(name)
    if root.is_dir():
        return _find_in_folder(root)
    if root.is_file() and root.suffix == ".txt":
        return lambda: read_list(root), None
    if root.suffix in PACKED:
        paths = _expand(name)
        return lambda: PACKED[root.suffix](paths), None
    raise InputError(
        "data: expected 'digits', a folder of images, a list (.txt), or shards (.tar, .parquet), "
        f"got {name!r}: no such folder or file"
    )


def _find_in_folder(root: Path) -> tuple[Opener, Opener | None]:
    if (root / "train").is_dir():
        test = next((root / t for t in TEST_NAMES if (root / t).is_dir()), None)
        return _folder_opener(root / "train"), _folder_opener(test) if test else None
    packed = _packed_files(root)
    if not packed:
        return lambda: read_folder(root), None
    open_packed = PACKED[packed[0].suffix]
    by_name = {key: [p for p in packed if p.name.startswith(key)] for key in (*TRAIN_NAMES, *TEST_NAMES)}
    test_files = next((by_name[key] for key in TEST_NAMES if by_name[key]), [])
    if by_name["train"] and test_files:
        return lambda: open_packed(by_name["train"]), lambda: open_packed(test_files)
    return lambda: open_packed(packed), None


def _folder_opener(folder: Path) -> Opener:
    packed = _packed_files(folder)
    return (lambda: PACKED[packed[0].suffix](packed)) if packed else (lambda: read_folder(folder))


def _packed_files(folder: Path) -> list[Path]:
    """Shards or tables in a folder, or in its `data/`."""
    for place in (folder, folder / "data"):
        for suffix in PACKED:
            found = sorted(p for p in place.glob(f"*{suffix}") if not p.name.startswith("."))
            if found:
                return found
    return []


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern with `{000..123}`, all of them whether they are there or not, or with `*`."""
    if match := RANGE.search(pattern):
        low, high = match.groups()
        numbers = range(int(low), int(high) + 1)
        return [p for n in numbers for p in _expand(pattern.replace(match[0], f"{n:0{len(low)}}", 1))]
    if not glob.has_magic(pattern):
        return [Path(pattern)]
    found = sorted(glob.glob(pattern))
    if not found:
        raise InputError(f"data: expected files named {pattern}, got none")
    return [Path(p) for p in found]


def read_folder(root: Path) -> Opened:
    """List a folder of class folders, or a flat folder of images; sorted, hidden files left out."""
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = {name: _images_below(root / name) for name in classes}
    classes = [name for name in classes if files[name]]
    if classes:
        paths = [path for name in classes for path in files[name]]
        labels = np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes])
        return Opened(Files(paths), labels, tuple(classes))
    flat = _images_below(root)
    if not flat:
        raise InputError(f"data: expected images ({' '.join(EXTENSIONS)}) in {root}, got none")
    return Opened(Files(flat), None, ())


def read_list(file: Path) -> Opened:
    """A path a line, relative to the list's folder, with a label after a tab or without."""
    lines = [line.rstrip("\r") for line in file.read_text(encoding="utf-8").split("\n")]
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows:
        raise InputError(f"data: expected a path in every line of {file}, got an empty list")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or lengths - {1, 2}:
        raise InputError(f"data: expected PATH or PATH<tab>LABEL in every line of {file}, got a mixture")
    images = Files(file.parent / row[0] for row in rows)
    if lengths == {1}:
        return Opened(images, None, ())
    classes, labels = np.unique([row[1] for row in rows], return_inverse=True)
    return Opened(images, labels.astype(np.int64), tuple(str(c) for c in classes))


def load_digits() -> ImageSource:
    """scikit-learn's 1,797 handwritten digits (8 x 8, 17 grey levels), enlarged to 32 x 32."""
    try:
        from sklearn import datasets
    except ImportError:
        raise InputError(
            "data: 'digits' needs scikit-learn; install it with: pip install 'poa-pretrain[quickstart]'"
        ) from None
    digits = datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(d).resize((32, 32), Image.Resampling.BICUBIC)) for d in grey]
    images = Arrays([np.repeat(d[..., None], 3, axis=2) for d in large])
    return ImageSource.whole(Opened(images, digits.target.astype(np.int64), tuple("0123456789")))


def _images_below(folder: Path) -> list[str]:
    found = [
        os.path.join(directory, file)
        for directory, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
    ]
    return sorted(found, key=lambda path: path.split(os.sep))


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
