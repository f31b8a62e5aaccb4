"""Batches of decoded images on padded canvases, for training and for evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from poa.data.sources import ImageSource
from poa.random import stream_seed

Canvases = tuple[Tensor, Tensor]
"""uint8 `[B, 3, H, W]` with images in the top-left corners, int64 `[B, 2]` their (height, width)."""


class DecodedImages(Dataset[np.ndarray]):
    """The images of a source, decoded to fit a canvas."""

    def __init__(self, source: ImageSource, canvas: int):
        self.source = source
        self.canvas = canvas

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source.read(index, self.canvas)


def collate_canvases(images: Sequence[np.ndarray]) -> Canvases:
    """Put images `[H, W, 3]` of any sizes on zero-padded canvases as large as the largest of them."""
    sizes = torch.tensor([image.shape[:2] for image in images])
    height, width = sizes.amax(0).tolist()
    canvas = torch.zeros(len(images), height, width, 3, dtype=torch.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = torch.from_numpy(image.copy())
    return canvas.permute(0, 3, 1, 2).contiguous(), sizes


class SampleStream:
    """Indices of one process's chunks of every step: an endless sequence of shuffles, cut into chunks.

    The chunks of a step take neighbouring parts of the sequence, so the images of a step do not depend on how
    many processes share it. Position in the sequence is a function of the step.

    Args:
        images: how many there are.
        batch_size: images of a chunk.
        chunks: which chunks of a step are this process's.
        step_chunks: chunks of a step, over all processes.
        steps: range of steps to produce.
        seed: of the run.
        start: position in the sequence of the first image of step 0; may be negative.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        chunks: Sequence[int],
        step_chunks: int,
        steps: range,
        seed: int,
        start: int = 0,
    ):
        self.images = images
        self.batch_size = batch_size
        self.chunks = chunks
        self.step_chunks = step_chunks
        self.steps = steps
        self.seed = seed
        self.start = start
        self._order = lru_cache(maxsize=4)(self._shuffle)

    def __len__(self) -> int:
        return len(self.steps) * len(self.chunks)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for chunk in self.chunks:
                first = self.start + (step * self.step_chunks + chunk) * self.batch_size
                yield [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.images)
        return int(self._order(epoch)[offset])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(stream_seed(self.seed, "order", epoch)).permutation(self.images)


def training_batches(
    source: ImageSource, stream: SampleStream, canvas: int, workers: int
) -> DataLoader[np.ndarray]:
    """A loader of one `Canvases` batch per chunk of the stream."""
    return DataLoader(
        DecodedImages(source, canvas),
        batch_sampler=stream,
        num_workers=_useful(workers),
        collate_fn=collate_canvases,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )


def evaluation_batches(
    source: ImageSource, canvas: int, workers: int, batch_size: int = 256
) -> DataLoader[np.ndarray]:
    """A loader of all images once, in order, as `Canvases` batches."""
    return DataLoader(
        DecodedImages(source, canvas),
        batch_size=batch_size,
        num_workers=_useful(workers),
        collate_fn=collate_canvases,
        pin_memory=torch.cuda.is_available(),
    )


def _useful(workers: int) -> int:
    """No more processes than there are CPUs for them."""
    return min(workers, os.cpu_count() or 1)
