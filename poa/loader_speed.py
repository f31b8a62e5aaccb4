"""How fast images are read, decoded and put into batches, without training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from poa.config import Config
from poa.data.loader import SampleStream, training_batches, useful_workers


def loader_speed(config: Config, workers: Sequence[int], seconds: float) -> Iterator[str]:
    """A line for each number of worker processes: images a second, and that over the processes that decode.

    Each is measured for so many seconds after its first batch; with 0 workers, this process decodes.
    """
    method = config.method
    data = config.open()
    yield f"{len(data.train):,} images, canvas of {method.canvas} pixels, batches of {method.batch_size}"
    if data.left_out:
        yield f"left out: {data.left_out}"
    for wanted in workers:
        stream = SampleStream(
            len(data.train), method.batch_size, [0], 1, range(10**9), method.seed, block=method.shuffle_block
        )
        count = useful_workers(wanted)
        batches = training_batches(data.train, stream, method.canvas, count, config.run.timeout)
        next(batches)
        images = unreadable = 0
        start = now = time.perf_counter()
        while now - start < seconds:
            batch = next(batches)
            images += len(batch.images)
            unreadable += len(batch.unreadable)
            now = time.perf_counter()
        rate = images / (now - start)
        lost = f", {unreadable} unreadable" if unreadable else ""
        yield (
            f"{count} workers: {rate:,.0f} images/s, {rate / max(count, 1):,.0f} images/s per core "
            f"({images:,} images{lost})"
        )
