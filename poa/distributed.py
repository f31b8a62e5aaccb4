"""The processes of a run: one, or those that `torchrun` or `srun` starts."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401, see `world`
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from poa.device import choose_device
from poa.errors import InputError, PeerError

T = TypeVar("T")

ANSWER_SECONDS = 5.0  # what the living get to say so when a process is missed
LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "store")  # in what torch raises then


@dataclass(frozen=True)
class World:
    """This process among all processes, and its device.

    Attributes:
        rank, size: of this process, and of all.
        device: that this process trains on.
        hosts: process group for what lies in CPU memory; None for a single process.
        store: that all processes share; None for a single process.
    """

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, parts: int, rank: int | None = None) -> range:
        """The parts of a whole that are this process's (or another's): neighbours, in even numbers."""
        rank = self.rank if rank is None else rank
        return range(rank * parts // self.size, (rank + 1) * parts // self.size)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in all of them; an `InputError` of it is raised in all."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except InputError as error:
                made[1] = str(error)
        dist.broadcast_object_list(made, group=self.hosts)
        if made[1] is not None:
            raise InputError(made[1])
        return made[0]

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them. Small things only: they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """The rows of all processes one after the other, on the main process; None on the others.

        Args:
            rows: CPU tensor `[N, ...]`; N may differ between processes, the rest may not.
        """
        if self.size == 1:
            return rows
        shapes = self.gather(tuple(rows.shape))
        if not self.is_main:
            if len(rows):
                dist.send(rows.contiguous(), 0, group=self.hosts)
            return None
        rest = next((shape[1:] for shape in shapes if shape[0]), rows.shape[1:])
        whole = rows.new_empty(sum(shape[0] for shape in shapes), *rest)
        whole[: len(rows)] = rows
        start = len(rows)
        for rank, shape in enumerate(shapes[1:], start=1):
            if shape[0]:
                dist.recv(whole[start : start + shape[0]], rank, group=self.hosts)
            start += shape[0]
        return whole


class Poll:
    """Yes or no, asked in every step: whether any process said yes, known one step later.

    It goes between the CPUs while the step runs, so that nobody waits for a device.
    """

    def __init__(self, here: World):
        self.here = here
        self.asked: tuple[dist.Work | None, Tensor] | None = None

    def ask(self, answer: bool) -> bool:
        """Give this process's answer; return whether any gave a yes in the call before (here: in this one,
        for a process alone)."""
        if self.here.size == 1:
            return answer
        before = self.asked
        vote = torch.tensor([int(answer)])
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.here.hosts, async_op=True)
        self.asked = (work, vote)
        if before is None:
            return False
        if before[0] is not None:
            before[0].wait()
        return bool(before[1].item())


@contextmanager
def world(device_name: str, timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that a launcher started, or be the only one.

    Uses NCCL on GPUs and gloo on CPUs, and leaves the process group in the end.

    Nothing may hold the group after that: gloo's threads would live on, and one that meets the end of the
    interpreter aborts the process. So a DDP module must not outlive the context, and
    `torch.distributed.nn.functional`, whose default arguments keep the group of the moment, is
    imported early.

    Args:
        device_name: see `choose_device`.
        timeout: seconds to wait for another process before it is missed.

    Raises:
        PeerError: another process is dead or does not answer.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    patience = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://"))
    # The CPUs talk in every step; they notice first, and can say so, where NCCL would abort the process.
    backend, wait = ("nccl", 2 * patience) if device.type == "cuda" else ("gloo", patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    try:
        hosts = dist.new_group(backend="gloo", timeout=patience)
        with _missing_peers(here := World(rank, size, device, hosts, dist.PrefixStore("poa", store))):
            yield here
        del here, hosts
    finally:
        gc.collect()  # DDP modules lie in reference cycles
        dist.destroy_process_group()


@contextmanager
def _missing_peers(here: World) -> Iterator[None]:
    """Turn an error of the process group into one that names the processes that do not answer."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip() or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError) or not any(word in text.lower() for word in LOST):
            raise
        silent = _silent(here)
        who = ", ".join(str(rank) for rank in silent) or "none, but a connection broke"
        reason = text.splitlines()[0]
        raise PeerError(
            f"rank {here.rank} of {here.size}: another process is missed; without an answer: {who} ({reason})"
        ) from None


def _silent(here: World) -> Sequence[int]:
    """The processes that do not answer within `ANSWER_SECONDS`: all that miss one ask at about one time."""
    assert here.store is not None
    missing = set(range(here.size)) - {here.rank}
    try:
        here.store.set(f"alive {here.rank}", "yes")
        deadline = time.monotonic() + ANSWER_SECONDS
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not here.store.check([f"alive {rank}"])}
            time.sleep(0.1)
    except RuntimeError:  # the store went with the process that kept it
        pass
    return sorted(missing)


def mean_in_bf16(size, bucket):  # type: ignore[no-untyped-def]
    """DDP's communication of a bucket of gradients over `size` processes, in half of the bytes.

    As PyTorch's `bf16_compress_hook`, which insists on NCCL. DDP takes no annotations that are strings.
    """
    buffer = bucket.buffer()
    sent = (buffer / size).to(torch.bfloat16)
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None

    def widened(_: torch.futures.Future[Any]) -> Tensor:
        return buffer.copy_(sent)

    return work.get_future().then(widened)
