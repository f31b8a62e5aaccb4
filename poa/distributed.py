"""The processes of a run: one, or those that `torchrun` or `srun` starts."""

from __future__ import annotations

import gc
import itertools
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401, see `init_distributed`
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from poa import errors
from poa.device import choose_device, use_threads
from poa.errors import InputError, PeerError

T = TypeVar("T")

BEAT_SECONDS = 1.0  # between the signs of life of a main process at work alone
RESPONSE_SECONDS = 5.0  # what the others get to say what happened, when a connection breaks
# What RuntimeErrors of process groups and their store say; `dist.DistError` is raised by some only.
LOST = re.compile(r"gloo/|ProcessGroup|NCCL|TCPStore|Connection (closed|reset|refused)|Broken pipe|Timed out")


@dataclass
class World:
    """This process among all processes, and its device.

    Attributes:
        rank, size: of this process, and of all.
        device: that this process trains on.
        cpu_group: process group for what lies in CPU memory; None for a single process, and after the end.
        store: that all processes share; None for a single process.
        timeout: seconds without a sign of life after which a process is given up.
    """

    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    timeout: float = 600.0
    _alone: Iterator[int] = field(default_factory=itertools.count, compare=False)

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
        """What the main process makes, in all of them.

        It may take as long as it takes: the others wait while it shows signs of life.

        Raises:
            InputError, SaveError, DivergenceError: in all processes, where the main one raises it.
            PeerError: in the others, where the main process shows no sign of life for `timeout` seconds.
        """
        if self.size == 1:
            return make()
        assert self.store is not None
        made: list[Any] = [None, "", ""]
        name = f"alone {next(self._alone)}"
        if self.is_main:
            with _signs_of_life(self.store, name):
                try:
                    made[0] = make()
                except (errors.InputError, errors.SaveError, errors.DivergenceError) as error:
                    made[1:] = type(error).__name__, str(error)
        else:
            self._await_main(self.store, name)
        dist.broadcast_object_list(made, group=self.cpu_group)
        if made[1]:
            raise getattr(errors, made[1])(made[2])
        return made[0]

    def _await_main(self, store: dist.Store, name: str) -> None:
        """Wait until the main process has done something alone."""
        beat, seen, pause = b"", time.monotonic(), 0.001
        while not store.check([f"{name} done"]):
            if store.check(["failed 0"]):
                raise PeerError(_told(self, {0: store.get("failed 0").decode()}))
            newest = store.get(name) if store.check([name]) else b""
            if newest != beat:
                beat, seen = newest, time.monotonic()
            elif time.monotonic() - seen > self.timeout:
                raise PeerError(
                    f"rank {self.rank} of {self.size}: lost contact with rank 0: no sign of life for "
                    f"{self.timeout:g} s (run.timeout)"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def require_same(self, what: str, values: Mapping[str, object]) -> None:
        """Raise InputError, in all processes, where a value is not the same in all of them.

        The values are small, and in the same order everywhere; `what` they are begins the message.
        """
        for rank, others in enumerate(self.gather(dict(values))):
            for name, value in values.items():
                if others.get(name) != value:
                    ours, theirs = f"{value} on rank {self.rank}", f"{others.get(name)} on rank {rank}"
                    raise InputError(f"{what}: expected the same on all ranks, got {name} {ours}, {theirs}")

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them. Small things only: they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """The rows of all processes one after the other, on the main process; None on the others.

        Rows are CPU tensors `[N, ...]`; N may differ between processes, the rest may not.
        """
        if self.size == 1:
            return rows
        shapes = self.gather(tuple(rows.shape))
        if not self.is_main:
            if len(rows):
                dist.send(rows.contiguous(), 0, group=self.cpu_group)
            return None
        rest = next((shape[1:] for shape in shapes if shape[0]), rows.shape[1:])
        whole = rows.new_empty(sum(shape[0] for shape in shapes), *rest)
        whole[: len(rows)] = rows
        start = len(rows)
        for rank, shape in enumerate(shapes[1:], start=1):
            if shape[0]:
                dist.recv(whole[start : start + shape[0]], rank, group=self.cpu_group)
            start += shape[0]
        return whole


class Poll:
    """Yes or no, asked in every step: whether any process said yes, known one step later.

    It goes between the CPUs while the step runs, so that no process waits for a device.
    """

    def __init__(self, world: World):
        self.world = world
        self.asked: tuple[dist.Work | None, Tensor] | None = None

    def ask(self, answer: bool) -> bool:
        """Give this process's answer; return whether any said yes in the call before (alone: in this one)."""
        if self.world.size == 1:
            return answer
        before = self.asked
        vote = torch.tensor([int(answer)])
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.world.cpu_group, async_op=True)
        self.asked = (work, vote)
        if before is None:
            return False
        if before[0] is not None:
            before[0].wait()
        return bool(before[1].item())


@contextmanager
def init_distributed(device_name: str, timeout: float = 600.0, threads: int | None = None) -> Iterator[World]:
    """Join the processes that a launcher started, or be the only one.

    Uses NCCL on GPUs and gloo on CPUs, and leaves the process group in the end.

    Nothing may hold the group after that: gloo's threads would live on, and one that meets the end of the
    interpreter aborts the process. So a DDP module must not outlive the context, and
    `torch.distributed.nn.functional`, whose default arguments keep the group of the moment, is imported
    early.

    Raises:
        InputError: a launcher's environment that makes no sense.
        PeerError: another process never came, failed, or does not respond for `timeout` seconds; the message
            names it.
    """
    rank, size, local = (
        _from_launcher(*what) for what in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if rank >= size:
        raise InputError(f"RANK: expected one below WORLD_SIZE {size} in the environment, got {rank}")
    device = choose_device(device_name, local)
    use_threads(threads, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device, timeout=timeout)
        return
    patience = timedelta(seconds=timeout)
    store = _meet(rank, size, patience)
    # The CPUs talk in every step; they notice first, and can say so, where NCCL would abort the process.
    backend, wait = ("nccl", 2 * patience) if device.type == "cuda" else ("gloo", patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    world, failed = World(rank, size, device, store=dist.PrefixStore("poa", store), timeout=timeout), False
    try:
        world.cpu_group = dist.new_group(backend="gloo", timeout=patience)
        with _told_failures(world):
            yield world
    except BaseException as error:
        failed = True
        _let_go(error)
        raise
    finally:
        world.cpu_group = None
        gc.collect()  # DDP modules lie in reference cycles
        dist.destroy_process_group()
        if failed and rank == 0:
            _linger(world)


def is_main_process() -> bool:
    """Whether this is the process that writes and prints, also before and after `init_distributed`."""
    return _from_launcher("RANK", 0) == 0


def _from_launcher(name: str, default: int) -> int:
    """An environment variable of `torchrun` and the like."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}: expected a whole number in the environment, got {text!r}")
    return int(text)


def _meet(rank: int, size: int, patience: timedelta) -> dist.Store:
    """The store of all processes, once they are there."""
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=patience))
    except ValueError as error:  # an environment without an address
        raise InputError(f"launcher: expected what torchrun sets, got: {error}") from None
    except (RuntimeError, TimeoutError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PeerError(
            f"rank {rank} of {size}: expected all ranks within {patience.total_seconds():g} s (run.timeout), "
            f"got: {reason}"
        ) from None
    return store


@contextmanager
def _signs_of_life(store: dist.Store, name: str) -> Iterator[None]:
    """Let the others see that this process is alive; then that what it did alone is done."""
    done = threading.Event()

    def beat() -> None:
        for count in itertools.count():
            store.set(name, str(count))
            if done.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    store.set(f"{name} done", "")


@contextmanager
def _told_failures(world: World) -> Iterator[None]:
    """Tell the others what fails here; say of a connection that breaks which rank failed, and why."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip() or type(error).__name__
        lost = isinstance(error, dist.DistError) or (LOST.search(text) and not text.startswith("Caught "))
        if isinstance(error, PeerError) or not lost:  # `Caught`: in a decoding process of this rank
            _tell(world, error)
            raise
        raise PeerError(_told(world, _responses(world), text.splitlines()[0])) from None
    except errors.Preempted:
        raise
    except Exception as error:
        _tell(world, error)
        raise
    finally:
        _say(world, "ended")


def _tell(world: World, error: Exception) -> None:
    _say(world, "failed", f"{type(error).__name__}: {errors.one_line(error)}")


def _say(world: World, what: str, value: str = "") -> None:
    assert world.store is not None
    with suppress(RuntimeError):  # the store went with the process that kept it
        world.store.set(f"{what} {world.rank}", value)


def _responses(world: World) -> dict[int, str | None]:
    """What each other rank says within `RESPONSE_SECONDS`: how it failed, or "" if it lost contact, too."""
    assert world.store is not None
    responses: dict[int, str | None] = {}
    missing = set(range(world.size)) - {world.rank}
    with suppress(RuntimeError):
        world.store.set(f"alive {world.rank}", "")
        deadline = time.monotonic() + RESPONSE_SECONDS
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                for name in (f"failed {rank}", f"alive {rank}"):
                    if rank not in responses and world.store.check([name]):
                        responses[rank] = world.store.get(name).decode()
            missing -= responses.keys()
            time.sleep(0.05)
    return responses | dict.fromkeys(missing)


def _told(world: World, responses: Mapping[int, str | None], reason: str = "") -> str:
    """The message of a rank whose connection broke."""
    failed = [f"rank {rank} failed ({line})" for rank, line in responses.items() if line]
    silent = [f"lost contact with rank {rank}" for rank, line in responses.items() if line is None]
    what = "; ".join(failed or silent or [f"a connection broke, though all ranks respond ({reason})"])
    return f"rank {world.rank} of {world.size}: {what}"


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold: the others notice a failure when its connections close."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _linger(world: World) -> None:
    """Keep the store, which the main process may hold, until the others have read why this one ends."""
    assert world.store is not None
    deadline = time.monotonic() + RESPONSE_SECONDS
    with suppress(RuntimeError):
        while time.monotonic() < deadline and not world.store.check(
            [f"ended {rank}" for rank in range(1, world.size)]
        ):
            time.sleep(0.05)


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
