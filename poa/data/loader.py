"""Batches of decoded images on padded canvases, for training and for evaluation."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm.auto import tqdm

from poa.data.decode import ImageError
from poa.data.sources import ImageSource
from poa.errors import DataError, InputError
from poa.random import stream_seed
from poa.signals import STOPPING

SUBSTITUTES = 20  # tried in the place of an unreadable image
WINDOW = 8  # blocks that a block shuffle mixes
PREFETCHED = 2  # batches that a worker makes ahead, PyTorch's default
EVALUATION_BATCH = 256  # images
Transform = Callable[[np.ndarray, int], np.ndarray]
"""From an image uint8 `[H, W, 3]` and its position in the sequence of training to another such image."""

SHARED = Path("/dev/shm")  # through which workers pass batches, on Linux
MORE = "give it more (docker run --shm-size=2g)"


class Canvases(NamedTuple):
    """Decoded images.

    Attributes:
        images: uint8 `[B, C, H, W]`, each in the top-left corner.
        sizes: int64 `[B, 2]`, their (height, width).
        positions: int64 `[B]`, in the source.
        unreadable: messages about images that could not be read.
    """

    images: Tensor
    sizes: Tensor
    positions: Tensor
    unreadable: list[str]


class Decoded(NamedTuple):
    """What was read of an image, such as pixels `[H, W, C]`, or None; its position in the source, and what
    could not be read on the way."""

    image: Any
    position: int
    unreadable: list[str]


def place_on_canvases(images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Put images `[H, W, C]` of any sizes into the top-left corners of zero-padded canvases as large as the
    largest of them: uint8 `[B, C, H, W]`; and int64 `[B, 2]`, their (height, width)."""
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64).view(-1, 2)
    height, width = sizes.amax(0).tolist() if images else (0, 0)
    channels = images[0].shape[2] if images else 0
    canvas = torch.zeros(len(images), height, width, channels, dtype=torch.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = torch.from_numpy(image.copy())
    return canvas.permute(0, 3, 1, 2).contiguous(), sizes


def collate(samples: Sequence[Decoded]) -> Canvases:
    """A batch of the images that could be read; of a worker, in memory that it shares.

    PyTorch would put it there in a thread whose failure goes unnoticed.
    """
    readable = [s for s in samples if s.image is not None]
    images, sizes = place_on_canvases([s.image for s in readable])
    positions = torch.tensor([s.position for s in readable], dtype=torch.int64)
    if get_worker_info() is not None:
        images.share_memory_()
    return Canvases(images, sizes, positions, sum((s.unreadable for s in samples), []))


@dataclass(eq=False)
class SampleStream:
    """Which images one process's micro-batches of every step take: an endless sequence of shuffles, cut into
    micro-batches.

    The micro-batches of a step take neighbouring parts of the sequence, so the images of a step do not depend
    on how many processes share it. Position in the sequence is a function of the step.

    Attributes:
        images: how many there are.
        batch_size: images of a micro-batch.
        micro_batches, step_micro_batches: which of a step's are this process's, and how many there are.
        steps, seed: to produce; of the run.
        start: position in the sequence of the first image of step 0; may be negative.
        block: neighbouring images that stay near to each other in a shuffle: blocks are shuffled, then the
            images of every `WINDOW` blocks. 1: a full shuffle.
    """

    images: int
    batch_size: int
    micro_batches: Sequence[int]
    step_micro_batches: int
    steps: range
    seed: int
    start: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        self._order = lru_cache(maxsize=4)(self._shuffle)

    def __len__(self) -> int:
        return len(self.steps) * len(self.micro_batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Lists of (position in the sequence, image)."""
        for step in self.steps:
            for micro_batch in self.micro_batches:
                first = self.start + (step * self.step_micro_batches + micro_batch) * self.batch_size
                yield [(position, self._at(position)) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.images)
        return int(self._order(epoch)[offset])

    def _shuffle(self, epoch: int) -> np.ndarray:
        draw = np.random.default_rng(stream_seed(self.seed, "order", epoch))
        if self.block == 1:
            return draw.permutation(self.images)
        block = min(self.block, self.images)
        blocks = draw.permutation(-(-self.images // block))
        order = (blocks[:, None] * block + np.arange(block)).ravel()
        order = order[order < self.images]
        window = WINDOW * block
        return np.concatenate([draw.permutation(order[i : i + window]) for i in range(0, len(order), window)])


@dataclass(frozen=True, eq=False)
class _TrainingImages(Dataset[Decoded]):
    """Images by (position in the sequence, image). In the place of an unreadable one comes another, which the
    position in the sequence draws."""

    source: ImageSource
    canvas: int
    seed: int
    transform: Transform | None

    def __getitem__(self, sample: tuple[int, int]) -> Decoded:
        position, index = sample
        unreadable: list[str] = []
        draw = None
        for _ in range(SUBSTITUTES):
            try:
                image = self.source.read(index, self.canvas)
                image = self.transform(image, position) if self.transform else image
                return Decoded(image, index, unreadable)
            except ImageError as error:
                unreadable.append(str(error))
            draw = draw or np.random.default_rng(stream_seed(self.seed, "substitute", abs(position)))
            index = int(draw.integers(len(self.source)))
        raise InputError(
            f"data: expected readable images, got {SUBSTITUTES} in a row that are not: {unreadable[-1]}"
        )


@dataclass(frozen=True, eq=False)
class _AllImages(Dataset[Decoded]):
    """What a function reads of each of so many images in order; of unreadable ones none."""

    count: int
    read: Callable[[int], Any]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Decoded:
        try:
            return Decoded(self.read(index), index, [])
        except ImageError as error:
            return Decoded(None, index, [str(error)])


def training_batches(
    source: ImageSource,
    stream: SampleStream,
    canvas: int,
    workers: int,
    patience: float = 600.0,
    transform: Transform | None = None,
) -> Iterator[Canvases]:
    """One batch per micro-batch of the stream, on canvases of `canvas` pixels.

    Workers apply the transform, if there is one, to an image and its position in the sequence. Raises
    DataError: the workers give none for `patience` seconds.
    """
    images = _TrainingImages(source, canvas, stream.seed, transform)
    return batches_of(images, workers, patience, batch_sampler=stream)


def evaluation_batches(
    source: ImageSource,
    canvas: int,
    workers: int,
    batch_size: int = EVALUATION_BATCH,
    patience: float = 600.0,
) -> Iterator[Canvases]:
    """All readable images once, in order; see `training_batches`."""
    images = _AllImages(len(source), partial(source.read, canvas=canvas))
    return batches_of(images, workers, patience, batch_size=batch_size)


def looked_at(source: ImageSource, read: Callable[[int], Any], workers: int) -> Iterator[list[Decoded]]:
    """What a function reads of all images in order, batch by batch, with a bar of progress."""
    with tqdm(total=len(source), desc="images", unit="image", leave=False, disable=None) as bar:
        images = _AllImages(len(source), read)
        for batch in batches_of(images, workers, collate=list[Decoded], batch_size=64):
            yield batch
            bar.update(len(batch))


def batches_of(
    images: Dataset[Any],
    workers: int,
    patience: float = 600.0,
    collate: Callable[[list[Any]], Any] = collate,
    **batches: Any,
) -> Iterator[Any]:
    """Batches of what a dataset gives, by decoding processes; see `training_batches`."""
    workers = useful_workers(workers)
    loader = DataLoader(
        images,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals,
        timeout=patience if workers else 0,
        **batches,
    )
    try:
        yield from loader
    except RuntimeError as error:
        raise _data_error(error, workers, patience) from None


def _data_error(error: RuntimeError, workers: int, patience: float) -> Exception:
    """What an error of a loader means."""
    text = " ".join(str(error).split())
    if re.search(r"shared memory|No space left|Bus error", text):
        free = shutil.disk_usage(SHARED).free / 1e6 if SHARED.exists() else 0
        return DataError(
            f"data: expected room in {SHARED} for the batches of {workers} workers, got {free:,.0f} MB; "
            f"{MORE}, or set performance.workers=0"
        )
    if "timed out" in text:
        return DataError(
            f"data: expected a batch within {patience:g} s (run.timeout), got none: {workers} workers wait "
            "for the storage or do not respond"
        )
    if problem := re.search(r"DataLoader worker.*|Too many open files.*|Pin memory thread.*", text):
        return DataError(f"data: expected {workers} workers to keep running, got: {problem[0]}")
    return error


def require_shared_memory(image_bytes: int, batch_size: int, workers: int, evaluates: bool) -> None:
    """Refuse a run whose workers could not pass their batches, as with the 64 MiB of a Docker container.
    Raises InputError: less is free than the batches of all ranks of this machine take, those of evaluations
    included if it `evaluates`."""
    workers, ranks = useful_workers(workers), os.environ.get("LOCAL_WORLD_SIZE", "")
    images = batch_size + EVALUATION_BATCH * evaluates
    each = PREFETCHED * images * image_bytes * (int(ranks) if ranks.isdecimal() else 1)
    if not workers or not SHARED.exists():
        return
    free = shutil.disk_usage(SHARED).free
    if workers * each > free:
        raise InputError(
            f"performance.workers: expected {workers * each / 1e6:,.0f} MB free in {SHARED} for the batches "
            f"of {workers} workers, got {free / 1e6:,.0f} MB; {MORE}, or set "
            f"performance.workers={free // each}"
        )


def _outlive_signals(worker: int) -> None:
    """Leave it to the training process to stop: a scheduler may send its signals to all processes."""
    for number in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    """Obey the SIGTERM of the training process alone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def useful_workers(workers: int) -> int:
    """No more processes than there are CPUs for them."""
    return min(workers, os.cpu_count() or 1)
