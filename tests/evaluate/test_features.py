"""Features take no more open files, and no more disk, than is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poa.data.crops import CropsConfig
from poa.data.loader import evaluation_batches
from poa.data.sources import ImageSource
from poa.data.storage import Arrays
from poa.distributed import World
from poa.evaluate import features

ALONE = World(0, 1, torch.device("cpu"))


def black(count: int) -> ImageSource:
    return ImageSource(
        Arrays([np.zeros((4, 4, 3), np.uint8)] * count), np.arange(count), np.arange(count), ()
    )


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_open_files_do_not_grow_with_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of decoding processes are open files until nobody holds them."""
    count, opened = 400, []
    source = black(count)
    monkeypatch.setattr(features, "evaluation_batches", partial(evaluation_batches, batch_size=4))

    def function(images: Tensor) -> Tensor:
        opened.append(len(os.listdir("/proc/self/fd")))
        return images.flatten(1)[:, :2]

    extracted = features.extract_features([function], source, CropsConfig(), ALONE, canvas=4, workers=1)
    assert extracted is not None and torch.equal(extracted.labels, torch.arange(count))
    assert len(opened) == 100 and max(opened[10:]) <= max(opened[:10]) + 4, opened


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_features_that_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full temporary folder is an error, where writing to a mapped file would be a SIGBUS."""

    def full(handle: int, offset: int, size: int) -> Iterator[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    source = black(4)
    with pytest.raises(OSError, match="No space left on device"):
        features.extract_features([lambda x: x.flatten(1)], source, CropsConfig(), ALONE, canvas=4)
