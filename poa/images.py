"""The images of a run, the same on all of its ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from poa.checkpoint import log
from poa.config import Config
from poa.data.decode import ImageError
from poa.data.layout import Openers
from poa.data.loader import require_shared_memory
from poa.data.sources import DataSplit, ImageSource
from poa.data.summary import printable
from poa.distributed import World
from poa.errors import InputError
from poa.progress import say

T = TypeVar("T")

SAMPLE = 16  # images that are tried at the beginning
PATIENCE = 20.0  # seconds after which a line says that images are searched


def open_on_ranks(config: Config, world: World, openers: Openers | None = None) -> DataSplit:
    """Open the images; the main process does so first, so that shards are listed once. Raises InputError:
    they cannot be used, are not the same on all ranks, or the workers could not pass them."""
    data = main_first(lambda: config.open(openers), config.data.source, world)
    for source in (data.train, data.test):
        if source is not None:
            world.from_main(partial(require_readable, source, config.method.canvas))
    for line in data.lost if world.is_main else ():
        log.warning("data: %s; continuing without it", line)
    if world.is_main and (untaught := data.untaught()):
        log.warning("data: %s", untaught)
    if world.size > 1:
        counts = {"images": len(data.train), "held-out images": len(data.test or ())}
        world.require_same("data", {**counts, "checksum of names and labels": data.digest()})
    evaluates = bool(config.run.evaluate_every and data.test)
    method = config.method
    image_bytes = method.backbone.channels * method.canvas**2
    require_shared_memory(image_bytes, method.batch_size, config.performance.workers, evaluates)
    return data


def main_first(find: Callable[[], T], name: str, world: World) -> T:
    """What every rank finds of images of a name, the main one before the others."""
    results: list[T] = []
    patience = threading.Timer(PATIENCE, say, [f"data: looking for the images of {printable(name)}"])
    if world.is_main:
        patience.start()
    try:
        world.from_main(lambda: results.append(find()))
    finally:
        patience.cancel()
    return results[0] if world.is_main else find()


def require_readable(source: ImageSource, canvas: int) -> None:
    """Try some images, spread over all; warn of unreadable ones. Raises InputError: all of them are."""
    tried = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(np.int64)).tolist()
    wrong = []
    for index in tried:
        try:
            source.read(index, canvas)
        except ImageError as error:
            wrong.append(str(error))
    if len(wrong) == len(tried):
        raise InputError(f"data: expected readable images, got none of {len(tried)} tried: {wrong[0]}")
    if wrong:
        log.warning("data: %d of %d images tried cannot be read: %s", len(wrong), len(tried), wrong[0])
