"""Features of a data set for any number of subnets, decoding every image once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from poa.data.crops import CropsConfig
from poa.data.loader import evaluation_batches
from poa.data.preprocessing import Preprocessing
from poa.data.sources import ImageSource
from poa.distributed import World
from poa.evaluate.protocol import Function

MEMORY = 8 << 30  # bytes of features that may lie in memory at once; more go to a file


@dataclass(frozen=True)
class FeatureSet:
    """Features of all readable images of a source, in order.

    Attributes:
        features: `[images, channels_i]` on the CPU, of each function.
        labels: int64 `[images]`; empty where the source has none.
        unreadable: messages about the images that are left out.
    """

    features: list[Tensor]
    labels: Tensor
    unreadable: list[str]


@torch.no_grad()
def extract_features(
    functions: Sequence[Function],
    source: ImageSource,
    crops: CropsConfig,
    world: World,
    *,
    canvas: int,
    workers: int = 0,
) -> FeatureSet | None:
    """Results of functions of normalised images `[B, C, S, S]` on the centre crops of all readable images.

    Every process takes a part of the images; all but the main one get None.
    """
    positions = torch.as_tensor(world.share(len(source)))
    mine = source.subset(positions.numpy())
    banks, preprocessing = [Bank(len(mine)) for _ in functions], Preprocessing.of(crops, canvas)
    kept, unreadable = [positions[:0]], list[str]()
    bar = tqdm(
        total=len(mine), desc="features", unit="image", leave=False, disable=None if world.is_main else True
    )
    for batch in evaluation_batches(mine, canvas, workers, patience=world.timeout):
        bar.update(len(batch.positions) + len(batch.unreadable))
        kept.append(batch.positions.clone())  # not the loader's memory, which is an open file a batch
        unreadable += batch.unreadable
        if not len(batch.images):
            continue
        images = preprocessing.crop(batch.images.to(world.device, non_blocking=True), batch.sizes)
        for bank, function in zip(banks, functions, strict=True):
            bank.add(function(images).cpu())
    bar.close()
    read = torch.cat(kept)
    labels = torch.zeros(0, dtype=torch.int64) if mine.labels is None else torch.from_numpy(mine.labels)[read]
    gathered = [world.gather_rows(rows) for rows in [labels, *(bank.rows() for bank in banks)]]
    lost = sum(world.gather(unreadable), [])
    if not world.is_main:
        return None
    whole = [rows for rows in gathered if rows is not None]
    return FeatureSet(whole[1:], whole[0], lost)


class Bank:
    """Rows that come in batches, in memory or, where they are too many, in a temporary file."""

    def __init__(self, most: int):
        self.most = most
        self.filled = 0
        self.storage: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        if self.storage is None:
            shape = (self.most, *rows.shape[1:])
            count = self.most * rows[0].numel()
            if count * rows.element_size() <= MEMORY:
                self.storage = rows.new_empty(shape)
            else:
                with tempfile.NamedTemporaryFile() as file:
                    if hasattr(os, "posix_fallocate"):  # a full disk is an error then, not a SIGBUS later
                        os.posix_fallocate(file.fileno(), 0, count * rows.element_size())
                    self.storage = torch.from_file(file.name, shared=True, size=count, dtype=rows.dtype)
                    self.storage = self.storage.view(shape)
        self.storage[self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)

    def rows(self) -> Tensor:
        return torch.zeros(0) if self.storage is None else self.storage[: self.filled]
