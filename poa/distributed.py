"""The processes of a run: one, or those that `torchrun` starts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401, see `world`
from torch import Tensor

from poa.device import choose_device


@dataclass(frozen=True)
class World:
    """This process among all processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values


@contextmanager
def world(device_name: str) -> Iterator[World]:
    """Join the processes that `torchrun` started, or be the only one.

    Uses NCCL on GPUs and gloo on CPUs, and leaves the process group in the end.

    Nothing may hold the group after that: gloo's threads would live on, and one that meets the end of the
    interpreter aborts the process. So a DDP module must not outlive the context, and
    `torch.distributed.nn.functional`, whose default arguments keep the group of the moment, is
    imported early.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        gc.collect()  # DDP modules lie in reference cycles
        dist.destroy_process_group()
