"""Choosing the training device and its CPU threads; work beside the main stream of a GPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from poa.errors import InputError

T = TypeVar("T")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` (CUDA where there is one, else CPU), `cpu`, `cuda` or `cuda:N`. Raises InputError: CUDA was
    requested and is not available, or the name is not a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device: expected a CUDA device for 'cuda', but torch sees none")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise InputError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
    elif device.type != "cpu":
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def use_threads(threads: int | None, device: torch.device) -> None:
    """Let PyTorch compute with so many CPU threads, at most one a CPU.

    None: with `OMP_NUM_THREADS`, as PyTorch does, and where that is not set with one on a CPU. Threads wait
    for each other at the end of every operator: beside other busy processes, several are far slower than one.
    """
    if threads is None and device.type == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        threads = 1
    if threads is not None:
        torch.set_num_threads(min(threads, os.cpu_count() or 1))


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """Let PyTorch take only algorithms whose results repeat bitwise, if `on`; ours all do."""
    if not on or torch.are_deterministic_algorithms_enabled():
        yield  # switching it, even off, imports PyTorch's compiler, which takes a second
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@lru_cache
def side_stream(device: torch.device, work: str) -> torch.cuda.Stream | None:
    """The stream of a GPU for some work that runs beside the main one; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on_side_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Work in a side stream, after everything started so far; `wait_stream` before its results are used.

    What is allocated there must be used up before the next `on_side_stream`, which waits for all readers.
    """
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    return torch.cuda.stream(stream)


def wait_stream(stream: torch.cuda.Stream | None) -> None:
    """What is started from here on comes after the work of a side stream."""
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def prepared_ahead(device: torch.device, prepare: Callable[[], T]) -> T:
    """What `prepare` makes out of host memory alone, made beside the step before.

    The host is ahead of a GPU, which still runs that step: on a stream of their own, copies and augmentation
    need not wait for it. What is started from here on comes after them. `prepare` reads nothing that other
    streams write, and gives tensors, dataclasses and sequences of them.
    """
    stream = side_stream(device, "input")
    if stream is None:
        return prepare()
    with torch.cuda.stream(stream):
        prepared = prepare()
    wait_stream(stream)
    for tensor in tensors_in(prepared):
        if tensor.is_cuda:  # the allocator may give its memory away only after the main stream has read it
            tensor.record_stream(torch.cuda.current_stream(device))
    return prepared


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested dataclasses and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
