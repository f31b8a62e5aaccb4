"""Times of calls: from a cold L2 and with their launches hidden on a GPU, by the clock on a CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.failures import Failures

FLUSH_BYTES = 256 << 20  # written between calls, more than any L2 cache
WARM_UP, MEASURE = 0.2, 0.5  # seconds of each provider and mode
REPEATS = (5, 200)  # at least, at most
HEAD_START = (2e-4, 5e-2)  # seconds that the device spins before a call: at first, at most
SPIN_CLOCK = 2e9  # cycles/s, not less than that of any GPU: it may spin longer, not shorter

Timed = Callable[[], Callable[[], object]]  # prepares, and returns what is timed


@dataclass
class Samples:
    """Seconds of a provider's calls, and how many began before the host had enqueued them whole."""

    seconds: list[float] = field(default_factory=list)
    unhidden: int = 0


def timed(call: Callable[[], object]) -> Timed:
    """A call that needs no preparation."""
    return lambda: call


def interleaved(
    calls: dict[str, Timed],
    device: torch.device,
    seconds: float,
    failures: Failures | None = None,
    hide: bool = True,
) -> dict[str, Samples]:
    """Times of single calls, the providers taking turns so that clocks and heat are the same for all.

    Args:
        calls: by provider.
        device: they run on.
        seconds: of measuring each.
        failures: gets those that fail, which have no times; default is to raise what they raise.
        hide: launches, on a GPU.
    """
    timer, failed = timer_of(device, hide), Failures() if failures is None else failures
    catch = failed.of if failures is not None else lambda name: contextlib.nullcontext()
    for name, call in calls.items():
        end = time.perf_counter() + min(WARM_UP, seconds)
        with catch(name):
            while True:
                timer(call)
                if time.perf_counter() > end:
                    break
    samples = {name: Samples() for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    least, most = REPEATS
    for repeat in range(most):
        if repeat >= least and time.perf_counter() > end:
            break
        for name in failed.spared(calls):
            with catch(name):
                spent, hidden = timer(calls[name])
                samples[name].seconds.append(spent)
                samples[name].unhidden += not hidden
    return {name: samples[name] for name in failed.spared(calls)}


def timer_of(device: torch.device, hide: bool) -> Callable[[Timed], tuple[float, bool]]:
    """A function that returns the seconds of one call, and whether its launches are hidden."""
    return CudaTimer(hide) if device.type == "cuda" else _cpu_time


def _cpu_time(call: Timed) -> tuple[float, bool]:
    run = call()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, True


class CudaTimer:
    """Times a call by events, with a cold L2.

    Args:
        hide: the device spins before the call for as long as the host needs to enqueue it. A call that waits
            for the device itself cannot be hidden.
    """

    def __init__(self, hide: bool):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._hide = hide
        self._head_starts: dict[Timed, float] = {}

    def __call__(self, call: Timed) -> tuple[float, bool]:
        while True:
            run, head = call(), self._head_starts.get(call, HEAD_START[0])
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            if self._hide:
                torch.cuda._sleep(int(head * SPIN_CLOCK))
            start.record()
            run()
            stop.record()
            hidden = not start.query()  # the device is still before the call, all of which is enqueued
            torch.cuda.synchronize()
            if hidden or not self._hide or head >= HEAD_START[1]:
                return start.elapsed_time(stop) / 1e3, hidden
            self._head_starts[call] = min(2 * head, HEAD_START[1])


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    values = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {f"p{p}": float(v) * 1e6 for p, v in zip((20, 50, 80), values, strict=True)}
