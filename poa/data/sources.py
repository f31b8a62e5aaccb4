"""Where images come from: the built-in digits, or folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from poa.errors import InputError
from poa.random import stream_seed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEST_FOLDERS = ("val", "test")


@dataclass(frozen=True)
class ImageSource:
    """A list of images, decoded when asked for.

    Attributes:
        items: paths of image files, or uint8 arrays `[H, W, 3]`.
        labels: int64 `[images]`, or None where there are none.
        classes: names of the labels.
    """

    items: Sequence[Path | np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int, canvas: int) -> np.ndarray:
        """One image as uint8 `[H, W, 3]`, shrunk (aspect kept) to fit a square of `canvas` pixels.

        Raises:
            InputError: the file is not a readable image; the message names it.
        """
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return item
        try:
            with Image.open(item) as image:
                image.draft("RGB", (canvas, canvas))
                rgb = image.convert("RGB")
                if max(rgb.size) > canvas:
                    rgb.thumbnail((canvas, canvas), Image.Resampling.BICUBIC)
                return np.asarray(rgb)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{item}: expected a readable image, got: {error}") from None

    def subset(self, indices: np.ndarray) -> ImageSource:
        """The images at these positions."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageSource([self.items[i] for i in indices], labels, self.classes)


@dataclass(frozen=True)
class DataSplit:
    """Images to train on and images held out; `test` is None where nothing has labels to test with."""

    train: ImageSource
    test: ImageSource | None


def open_data(name: str, holdout: float, seed: int) -> DataSplit:
    """Open `digits` or a folder of images.

    A folder may hold `train/` and `val/` or `test/`, or class folders (maybe inside a lone `train/`), of
    which a stratified share is held out, or just images, which are all trained on and have no labels.

    Args:
        name: "digits" or a path.
        holdout: share held out of every class where there is no test folder.
        seed: of the choice of held-out images.

    Raises:
        InputError: no such folder, or no images in it.
    """
    if name == "digits":
        return _hold_out(load_digits(), holdout, seed)
    root = Path(name)
    if not root.is_dir():
        raise InputError(f"data: expected 'digits' or a folder of images, got {name!r}: no such folder")
    if not (root / "train").is_dir():
        return _hold_out(read_folder(root), holdout, seed)
    train = read_folder(root / "train")
    test = next((root / t for t in TEST_FOLDERS if (root / t).is_dir()), None)
    if test:
        held_out = read_folder(test)
        if train.classes != held_out.classes:
            raise InputError(
                f"data: expected the classes of {root / 'train'} in {test}, "
                f"got {len(train.classes)} and {len(held_out.classes)} classes or other names"
            )
        return DataSplit(train, held_out if held_out.labels is not None else None)
    return _hold_out(train, holdout, seed)


def read_folder(root: Path) -> ImageSource:
    """List a folder of class folders, or a flat folder of images; sorted, hidden files left out."""
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = {name: _images_below(root / name) for name in classes}
    classes = [name for name in classes if files[name]]
    if classes:
        items = [path for name in classes for path in files[name]]
        labels = np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes])
        return ImageSource(items, labels, tuple(classes))
    flat = _images_below(root)
    if not flat:
        raise InputError(f"data: expected images ({' '.join(EXTENSIONS)}) in {root}, got none")
    return ImageSource(flat, None, ())


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
    items = [np.repeat(d[..., None], 3, axis=2) for d in large]
    return ImageSource(items, digits.target.astype(np.int64), tuple("0123456789"))


def _images_below(folder: Path) -> list[Path]:
    found = [
        Path(directory, file)
        for directory, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
    ]
    return sorted(found)


def _hold_out(source: ImageSource, share: float, seed: int) -> DataSplit:
    """Hold out a share of every class, at least one image of it; nothing without labels."""
    if source.labels is None:
        return DataSplit(source, None)
    draw = np.random.default_rng(stream_seed(seed, "holdout"))
    held: list[int] = []
    for label in range(len(source.classes)):
        members = draw.permutation(np.flatnonzero(source.labels == label))
        held += members[: max(round(share * len(members)), 1)].tolist()
    test = np.sort(np.array(held))
    train = np.setdiff1d(np.arange(len(source)), test)
    if not len(train):
        raise InputError(
            f"data: expected images left to train on, got {len(source)} images and holdout {share}"
        )
    return DataSplit(source.subset(train), source.subset(test))
