"""Batches: canvases, and which images a step sees."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_config
from poa.data.loader import (
    SampleStream,
    evaluation_batches,
    place_on_canvases,
    require_shared_memory,
    training_batches,
)
from poa.data.sources import ImageSource
from poa.data.storage import Arrays, Opened
from poa.errors import DataError, InputError
from poa.train import pretrain


def source(count: int) -> ImageSource:
    draw = np.random.default_rng(0)
    images = [draw.integers(1, 256, (4 + i % 3, 5 + i % 2, 3), dtype=np.uint8) for i in range(count)]
    return ImageSource.whole(Opened(Arrays(images), None, ()))


def test_collated_images_lie_in_the_top_left_corner() -> None:
    images = [source(4).read(i, 9) for i in range(4)]
    canvas, sizes = place_on_canvases(images)
    assert canvas.shape == (4, 3, 6, 6)
    assert canvas.dtype == torch.uint8
    for place, size, image in zip(canvas, sizes.tolist(), images, strict=True):
        assert tuple(size) == image.shape[:2]
        assert np.array_equal(place[:, : size[0], : size[1]].permute(1, 2, 0), image)
        assert int(place.count_nonzero()) == image.size


def stream(
    images: int,
    batch: int,
    micro_batch: int = 0,
    micro_batches: int = 1,
    steps: range = range(30),
    seed: int = 0,
    block: int = 1,
) -> list[list[int]]:
    """The images of every batch; their positions are consecutive."""
    batches = list(SampleStream(images, batch, [micro_batch], micro_batches, steps, seed, block=block))
    if micro_batches == 1:
        positions = [position for samples in batches for position, _ in samples]
        assert positions == list(range(steps.start * batch, steps.stop * batch))
    return [[image for _, image in samples] for samples in batches]


@pytest.mark.parametrize("images", [5, 24, 100])
def test_micro_batches_share_the_images_of_one_large_one(images: int) -> None:
    whole = stream(images, 12)
    parts = [stream(images, 4, micro_batch, 3) for micro_batch in range(3)]
    assert whole == [sum(step, []) for step in zip(*parts, strict=True)]


def test_every_image_once_a_pass() -> None:
    flat = sum(stream(20, 8), [])
    for start in range(0, 240, 20):
        assert sorted(flat[start : start + 20]) == list(range(20))
    assert flat[:20] != flat[20:40]


def test_position_is_a_function_of_the_step() -> None:
    assert stream(20, 8, steps=range(7, 30)) == stream(20, 8)[7:]
    assert stream(20, 8, seed=1) != stream(20, 8)


def test_blocks_stay_together() -> None:
    """Every image once a pass; a window of eight blocks holds eight whole blocks, the last one less."""
    order = sum(stream(1000, 50, steps=range(20), block=10), [])
    assert sorted(order) == list(range(1000))
    blocks = [{image // 10 for image in order[i : i + 80]} for i in range(0, 1000, 80)]
    assert [len(b) for b in blocks] == [8] * 12 + [4]
    assert sorted(order[:80]) != order[:80] and {image // 10 for image in order[:80]} != set(range(8))
    assert order != sum(stream(1000, 50, steps=range(20), block=10, seed=1), [])
    assert sorted(sum(stream(20, 10, steps=range(2), block=10**9), [])) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(workers: int) -> None:
    images = source(10)
    chosen = SampleStream(10, 4, [0], 1, range(5), 0)
    batches = list(training_batches(images, chosen, 32, workers))
    assert len(batches) == 5
    for batch, samples in zip(batches, chosen, strict=True):
        expected = place_on_canvases([images.read(image, 32) for _, image in samples])
        assert torch.equal(batch.images, expected[0])
        assert torch.equal(batch.sizes, expected[1])
        assert batch.positions.tolist() == [image for _, image in samples]


def test_evaluation_batches_are_in_order() -> None:
    batches = list(evaluation_batches(source(10), 32, 0, batch_size=4))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    assert torch.equal(batches[2].images, place_on_canvases([source(10).read(i, 32) for i in (8, 9)])[0])


class Broken(Arrays):
    """Images of which one does something else."""

    def __init__(self, images: list[np.ndarray], act: Callable[[], object]):
        super().__init__(images)
        self.act = act

    def open(self, index: int) -> np.ndarray:
        if index == 3:
            self.act()
        return super().open(index)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: time.sleep(1000), r"a batch within 1 s \(run.timeout\), got none: 1 workers wait for"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "1 workers to keep running, got: DataLoader worker"),
    ],
    ids=["stuck", "killed"],
)
def test_waiting_for_workers_ends(act: Callable[[], object], message: str) -> None:
    images = Broken([np.zeros((4, 4, 3), np.uint8)] * 6, act)
    batches = evaluation_batches(ImageSource.whole(Opened(images, None, ())), 8, 1, 2, patience=1.0)
    with pytest.raises(DataError, match=message):
        list(batches)


def test_no_room_to_pass_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in a worker is heard of at once."""

    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </x>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match="expected room in /dev/shm for the batches of 1 workers, got .* MB"):
        list(evaluation_batches(source(4), 8, 1))


def test_a_small_container_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    require_shared_memory(3 * 256**2, 64, 2, evaluates=False)
    require_shared_memory(3 * 256**2, 64, 0, evaluates=True)
    with pytest.raises(InputError, match="expected 252 MB .* 2 workers, got 67 MB; .* performance.workers=0"):
        require_shared_memory(3 * 256**2, 64, 2, evaluates=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="expected 403 MB"):
        require_shared_memory(3 * 256**2, 64, 2, evaluates=False)
    options = ["performance.workers=4", "method.canvas=4096"]
    with pytest.raises(InputError, match="^performance.workers: expected .* MB free in /dev/shm"):
        pretrain(tiny_config(*options), tmp_path / "run", check=True)


FORGOTTEN = """
import numpy as np
from poa.data.loader import evaluation_batches
from poa.data.sources import ImageSource
from poa.data.storage import Arrays, Opened
images = [np.zeros((4, 4, 3), np.uint8)] * 8
batches = iter(evaluation_batches(ImageSource.whole(Opened(Arrays(images), None, ())), 8, 2, batch_size=1))
cycle = [batches]
cycle.append(cycle)
next(batches)
del batches, cycle
"""


def test_a_program_ends_that_forgets_its_loader() -> None:
    """Decoding processes obey the SIGTERM of their parent, if no one else's."""
    subprocess.run([sys.executable, "-c", FORGOTTEN], check=True, timeout=60)
