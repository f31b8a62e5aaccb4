"""Images of map-style datasets, as objects: of PyTorch, torchvision or Hugging Face."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from poa.data.storage.base import Opened, join_labels
from poa.data.storage.parquet import LABELS, PHOTOS
from poa.data.summary import LeftOut
from poa.errors import InputError

DIGESTED = 16  # samples by which a dataset is known again
PICTURES = (1, 3, 4)  # channels of pixels that Pillow has pictures of


class Samples:
    """Images of a dataset, asked for by `dataset[index]`."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.kind = type(dataset).__name__

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.kind}[{index}]"

    def open(self, index: int) -> Image.Image | np.ndarray:
        return to_picture(_parts(self.dataset[index])[0])

    def identity(self) -> Iterable[bytes | np.ndarray]:
        return str(len(self)).encode(), self._digest

    @cached_property
    def _digest(self) -> bytes:
        return self.digest()

    def digest(self) -> bytes:
        """A checksum of some samples, spread over all; those that cannot be read count as such."""
        digest = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, DIGESTED).astype(np.int64)).tolist():
            try:
                picture = self.open(index)
                kind = f"{picture.mode} {picture.size}" if isinstance(picture, Image.Image) else picture.shape
                digest.update(f"{kind}".encode() + picture.tobytes())
            except Exception:  # datasets raise whatever they like
                digest.update(b"unreadable")
        return digest.digest()


def open_dataset(dataset: Any) -> Opened:
    """A dataset with `__len__` and `__getitem__`, whose samples are images, alone or with a label.

    A sample is an image, a tuple that begins with one, or a mapping with a column such as `image`. An image
    is one of Pillow, a uint8 tensor `[C, H, W]` or a uint8 array `[H, W, C]`, or `[H, W]` if it is grey.
    Labels are a column of labels, `dataset.targets`, or what stands next to the images, each of which is read
    once for it. Raises InputError: it is none, is empty, or gives other pixels when it is asked again.
    """
    kind = type(dataset).__name__
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"data: expected a dataset with __len__ and __getitem__, got {kind}")
    samples = Samples(dataset)
    if not len(samples):
        raise InputError(f"data: expected a dataset with images, got an empty {kind}")
    if samples.digest() != samples.digest():
        raise InputError(
            f"data: expected {kind} to give the same pixels each time, got others; training augments images "
            "by itself, so give the dataset without random transforms"
        )
    values, classes, origin = _labels(dataset)
    labels = [_label(value, classes) for value in values or ()]
    left_out = LeftOut()
    if None in labels:
        left_out.add("labels that are no numbers or names", samples.name(labels.index(None)), len(labels))
        labels = []
    names, codes = np.unique(np.array(labels, dtype=str), return_inverse=True)
    joined = join_labels([(codes, [str(name) for name in names])] if labels else [], classes)
    return Opened(samples, *joined, origin, left_out)


def to_picture(image: Any) -> Image.Image | np.ndarray:
    """A Pillow image, or pixels as one where it has as many bands, or else `[H, W, C]`. Raises ValueError:
    another type, dtype or shape."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, torch.Tensor | np.ndarray):
        raise ValueError(f"expected a Pillow image or uint8 pixels, got {type(image).__name__}")
    first = isinstance(image, torch.Tensor)
    pixels = image.numpy(force=True) if isinstance(image, torch.Tensor) else image
    channels = pixels.shape[0 if first else -1] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not 0 < channels <= 16:
        wanted = "[C, H, W]" if first else "[H, W, C]"
        raise ValueError(
            f"expected uint8 pixels {wanted} of 1 to 16 channels, or [H, W], got {pixels.dtype} "
            f"{list(pixels.shape)}; give the dataset without transforms that make other pixels"
        )
    if pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0) if first else pixels
        pixels = pixels[..., 0] if channels == 1 else pixels
    pixels = np.ascontiguousarray(pixels)
    return Image.fromarray(pixels) if channels in PICTURES else pixels


def _parts(sample: Any) -> tuple[Any, Any]:
    """The image and the label of a sample; None where it has no label."""
    if isinstance(sample, Mapping):
        image = next((name for name in PHOTOS if name in sample), None)
        if image is None:
            raise ValueError(f"expected a column of images such as image, got {', '.join(map(str, sample))}")
        return sample[image], next((sample[name] for name in LABELS if name in sample), None)
    if isinstance(sample, tuple | list):
        return sample[0], sample[1] if len(sample) > 1 else None
    return sample, None


def _labels(dataset: Any) -> tuple[Sequence[Any] | None, Sequence[str] | None, str]:
    """Labels of all samples, the names that numbers among them stand for, and where both come from."""
    if isinstance(dataset, torch.utils.data.Subset):
        values, classes, origin = _labels(dataset.dataset)
        return values and [values[index] for index in dataset.indices], classes, origin
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):  # of Hugging Face
        column = next((name for name in LABELS if name in features), None)
        classes = getattr(features.get(column), "names", None)
        return column and list(dataset[column]), classes, f"column {column!r}"
    classes = getattr(dataset, "classes", None)
    if hasattr(dataset, "targets"):
        values = dataset.targets.tolist() if hasattr(dataset.targets, "tolist") else list(dataset.targets)
        if len(values) != len(dataset):
            raise InputError(
                f"data: expected a label for each of {len(dataset)} samples in "
                f"{type(dataset).__name__}.targets, got {len(values)}"
            )
        return values, classes, "targets"
    if _label_of(dataset, 0) is None:
        return None, None, ""
    bar = tqdm(range(len(dataset)), desc="labels", unit="image", leave=False, disable=None)
    return [_label_of(dataset, index) for index in bar], classes, "samples"


def _label_of(dataset: Any, index: int) -> Any:
    try:
        label = _parts(dataset[index])[1]
    except Exception:  # of an image that cannot be read
        return ""
    return "" if label is None and index else label


def _label(value: Any, classes: Sequence[str] | None) -> str | None:
    """The name of a label, "" for a missing one; None for what is no single number or name."""
    value = value.item() if isinstance(value, torch.Tensor | np.generic) and np.ndim(value) == 0 else value
    if isinstance(value, bool | int) and classes is not None and 0 <= value < len(classes):
        return str(classes[value])
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, int) else value if isinstance(value, str) else None
