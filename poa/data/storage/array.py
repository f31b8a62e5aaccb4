"""Pixels in memory, and the built-in digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from poa.data.storage.base import Opened
from poa.errors import InputError


class Arrays:
    """Pixels in memory."""

    def __init__(self, images: Sequence[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> np.ndarray:
        return self.images[index]

    def identity(self) -> Iterable[bytes | np.ndarray]:
        return (np.repeat(x[..., None], 3, axis=2) if x.ndim == 2 else x for x in self.images)


def load_digits() -> Opened:
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
    return Opened(Arrays(large), digits.target.astype(np.int64), tuple("0123456789"), "scikit-learn")
