"""The images of a run, the same on all of its ranks."""

from __future__ import annotations

from poa.checkpoint import log
from poa.config import Config
from poa.data.loader import require_shared_memory
from poa.data.sources import DataSplit
from poa.distributed import World


def open_on_ranks(config: Config, world: World) -> DataSplit:
    """Open the images; the main process does so first, so that shards are listed once.

    Raises:
        InputError: they cannot be used, are not the same on all ranks, or the workers could not pass them.
    """
    found: list[DataSplit] = []

    def opened() -> None:
        found.append(config.data.open(config.method.seed))

    world.from_main(opened)
    if not world.is_main:
        opened()
    (data,) = found
    for line in data.lost if world.is_main else ():
        log.warning("data: %s; going on without it", line)
    if world.size > 1:
        counts = {"images": len(data.train), "held-out images": len(data.test or ())}
        world.require_same("data", {**counts, "checksum of names and labels": data.digest()})
    evaluates = bool(config.run.evaluate_every and data.test)
    method = config.method
    require_shared_memory(method.canvas, method.batch_size, config.performance.workers, evaluates)
    return data
