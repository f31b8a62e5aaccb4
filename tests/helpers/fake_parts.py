"""Cases that fail in every way there is, for a runner on a CPU."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.failures import DeviceLost, Refused, Trying
from benchmarks.results import place
from benchmarks.runner import Case, Emit, Part


def row(op: str, provider: str = "ours") -> dict[str, object]:
    base = {
        "op": op,
        "provider": provider,
        "mode": "fwd",
        "shape": "1",
        "dtype": "float32",
        "pid": os.getpid(),
    }
    return base | place("cpu")


def measured(op: str, emit: Emit, without: frozenset[str]) -> None:
    emit(row(op))


def raises(error: Exception, emit: Emit, without: frozenset[str]) -> None:
    emit(row("before"))
    raise error


def out_of_memory(emit: Emit, without: frozenset[str]) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore of it")


def dies(status: int, emit: Emit, without: frozenset[str]) -> None:
    emit(row("before"))
    os._exit(status)


def is_killed(emit: Emit, without: frozenset[str]) -> None:
    emit(row("before"))
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(emit: Emit, without: frozenset[str]) -> None:
    emit(row("before"))
    time.sleep(1000)


def peers(bad: dict[str, str], emit: Emit, without: frozenset[str]) -> None:
    """Providers of a case, some of which die, hang, lose the device or cannot run."""
    for provider in ("ours", "naive", "fast"):
        if provider in without:
            continue
        emit(Trying(provider))
        fate = bad.get(provider)
        if fate == "dies":
            os._exit(7)
        if fate == "hangs":
            time.sleep(1000)
        if fate == "loses the device":
            raise DeviceLost(provider, "AcceleratorError: CUDA error: an illegal memory access")
        emit(Refused(provider, fate) if fate else row("peers", provider))


def takes(seconds: float, mark: Path, emit: Emit, without: frozenset[str]) -> None:
    """Says in a file that it ran."""
    with mark.open("a") as file:
        file.write("ran\n")
    emit(row("slow"))
    time.sleep(seconds)


def part(*cases: tuple[str, object], seconds: float = 60.0, **how: object) -> Part:
    return Part("fake", [Case(name, run, seconds) for name, run in cases], **how)  # type: ignore[arg-type]


FINE = ("fine", partial(measured, "fine"))
