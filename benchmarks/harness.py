"""Measure providers of an operator side by side: gate, warm-up, interleaved timing, peak memory.

Every provider must first pass the gate: its output and every gradient are as good as naive PyTorch's in the
same dtype, against float64. Those that fail, or cannot run here, are listed with the reason and not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.accuracy import excess_error
from benchmarks.results import Row, place
from benchmarks.roofline import Ceilings
from poa.flops import DATASHEET_PEAKS

MODES = ("fwd", "bwd", "fwd+bwd")
FLUSH_BYTES = 256 << 20  # written between calls, more than any L2 cache
WARM_UP, MEASURE = 0.2, 0.5  # seconds of each provider and mode
REPEATS = (5, 200)  # at least, at most
TRUTH = "naive"  # the provider whose float64 result is the truth, and which every gate is relative to

Provider = Callable[..., Tensor]
Timed = Callable[[], Callable[[], object]]  # prepares, and returns what is timed


class Unavailable(Exception):
    """A provider cannot run here; says why."""


@dataclass(frozen=True)
class Problem:
    """An operator with its inputs.

    Attributes:
        op, shape: names for the row.
        leaves: tensors by argument name; gradients are taken of all.
        providers: functions of the leaves, or functions without arguments that make such, raising
            `Unavailable`.
        flops: of the forward; the backward counts twice.
        bytes: by mode, the fewest.
        trains: whether there is a backward.
    """

    op: str
    shape: str
    leaves: dict[str, Tensor]
    providers: dict[str, Callable[[], Provider]]
    flops: float
    bytes: dict[str, float]
    trains: bool = True

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.trains else MODES[:1]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.leaves.values())).device


@dataclass
class Outcome:
    """Rows of the providers that ran, and why others did not."""

    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def upstream(y: Tensor) -> Tensor:
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32).to(y.dtype)


def results_of(
    provider: Provider, leaves: dict[str, Tensor], trains: bool, dy: Tensor | None = None
) -> dict[str, Tensor]:
    """Output and gradients, detached."""
    if not trains:
        return {"output": provider(**leaves).detach()}
    inputs = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y = provider(**inputs)
    grads = torch.autograd.grad(y, list(inputs.values()), upstream(y) if dy is None else dy.to(y))
    return {"output": y.detach(), **{f"d{n}": g for n, g in zip(inputs, grads, strict=True)}}


def truth_of(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What naive PyTorch makes of a problem, in its own dtype and in float64."""
    naive = problem.providers[TRUTH]()
    low = results_of(naive, problem.leaves, problem.trains)
    double = {name: leaf.double() for name, leaf in problem.leaves.items()}
    return low, results_of(naive, double, problem.trains, upstream(low["output"]))


def gate(
    problem: Problem, provider: Provider, low: dict[str, Tensor], truth: dict[str, Tensor]
) -> str | None:
    """What is wrong with a provider's numbers, or None."""
    try:
        ours = results_of(provider, problem.leaves, problem.trains, upstream(low["output"]))
    except Unavailable:
        raise
    except Exception as error:  # peers fail in their own ways; the reason goes into the list
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, value in ours.items():
        wrong = excess_error(value.to(low[name].dtype), low[name], truth[name])
        if wrong:
            return f"{name}: {wrong}"
    return None


def run(
    problem: Problem, ceilings: Ceilings | None, only: Sequence[str] = (), seconds: float = MEASURE
) -> Outcome:
    """Measure a problem.

    Args:
        problem: to be measured.
        ceilings: of the device, for the share of the floor; None leaves it out.
        only: names of the providers to measure, default all.
        seconds: of measuring each provider and mode.
    """
    outcome, ready = Outcome(), {}
    low, truth = truth_of(problem)
    for name, make in problem.providers.items():
        if only and name not in only:
            continue
        try:
            provider = make()
            wrong = gate(problem, provider, low, truth)
        except Unavailable as reason:
            wrong = str(reason)
        if wrong:
            outcome.refused[name] = wrong
        else:
            ready[name] = provider
    del low, truth
    memory = {name: peak_mib(provider, problem) for name, provider in ready.items()}
    for mode in problem.modes:
        calls = {name: call_of(provider, problem, mode) for name, provider in ready.items()}
        for name, times in interleaved(calls, problem.device, seconds).items():
            outcome.rows.append(_row(problem, name, mode, times, memory[name], ceilings))
    return outcome


def timed(call: Callable[[], object]) -> Timed:
    """A call that needs no preparation."""
    return lambda: call


def call_of(provider: Provider, problem: Problem, mode: str) -> Timed:
    """A provider's forward, its backward (the forward prepares it), or both."""
    if not problem.trains:
        return timed(lambda: provider(**problem.leaves))
    inputs = {name: leaf.detach().requires_grad_() for name, leaf in problem.leaves.items()}
    variables = list(inputs.values())
    if mode == "fwd":
        return timed(lambda: provider(**inputs))
    dy = upstream(provider(**inputs))
    if mode == "fwd+bwd":
        return timed(lambda: torch.autograd.grad(provider(**inputs), variables, dy))

    def backward() -> Callable[[], object]:
        y = provider(**inputs)
        return lambda: torch.autograd.grad(y, variables, dy)

    return backward


def peak_mib(provider: Provider, problem: Problem) -> float | None:
    """Memory of a forward and backward beyond its inputs, in MiB; None without a GPU."""
    if problem.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results_of(provider, problem.leaves, problem.trains)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def interleaved(calls: dict[str, Timed], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of single calls, the providers taking turns so that clocks and heat are the same for all."""
    timer = timer_of(device)
    for call in calls.values():
        end = time.perf_counter() + min(WARM_UP, seconds)
        while True:
            timer(call)
            if time.perf_counter() > end:
                break
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    least, most = REPEATS
    for repeat in range(most):
        if repeat >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(timer(call))
    return times


def timer_of(device: torch.device) -> Callable[[Timed], float]:
    """A function that returns the seconds of one call."""
    return _cuda_timer() if device.type == "cuda" else _cpu_time


def _cpu_time(call: Timed) -> float:
    run = call()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_timer() -> Callable[[Timed], float]:
    """Times a call by events, with a cold L2; what flushes it also hides the host's launch."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def timer(call: Timed) -> float:
        run = call()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    return timer


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    values = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {f"p{p}": float(v) * 1e6 for p, v in zip((20, 50, 80), values, strict=True)}


def _row(
    problem: Problem,
    provider: str,
    mode: str,
    times: Sequence[float],
    mib: float | None,
    ceilings: Ceilings | None,
) -> Row:
    spread = quantiles(times)
    seconds, moved = spread["p50"] / 1e6, problem.bytes[mode]
    flops = problem.flops * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]
    row: Row = {
        "op": problem.op,
        "provider": provider,
        "mode": mode,
        "shape": problem.shape,
        "dtype": str(problem.dtype).removeprefix("torch."),
        **spread,
        "gb_per_s": moved / seconds / 1e9,
        "tflop_per_s": flops / seconds / 1e12,
        "peak_mib": mib,
        **place(problem.device.type),
    }
    if ceilings is not None:
        row["share_of_floor"] = max(flops / ceilings.matmul, moved / ceilings.copy) / seconds
    return row


def ceilings_of(device: torch.device, seconds: float = MEASURE) -> Ceilings:
    """Measure a large bf16 product and a device copy."""
    cuda = device.type == "cuda"
    size, count = (8192, 1 << 30) if cuda else (512, 1 << 24)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"product": timed(lambda: a @ b), "copy": timed(lambda: target.copy_(source))}
    times = {name: min(t) for name, t in interleaved(calls, device, seconds).items()}
    peak = DATASHEET_PEAKS.get(torch.cuda.get_device_name() if cuda else "")
    return Ceilings(
        2 * size**3 / times["product"],
        2 * count / times["copy"],
        peak,
        f"measured: {size}^3 bf16 product, copy of {count >> 20} MiB",
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a short table, a block for each problem."""
    previous = None
    for row in rows:
        problem = (row["op"], row["shape"], row["dtype"], row["mode"])
        if problem != previous:
            yield f"{row['op']} {row['shape']} {row['dtype']} {row['mode']}"
            previous = problem
        share = f"{row['share_of_floor']:6.1%} of floor" if "share_of_floor" in row else ""
        memory = f"{row['peak_mib']:9.1f} MiB" if row.get("peak_mib") is not None else ""
        yield (
            f"    {row['provider']:16}{row['p50']:12.1f} us  ({row['p20']:.1f} .. {row['p80']:.1f})"
            f"{row['gb_per_s']:10.1f} GB/s{row['tflop_per_s']:9.2f} TFLOP/s  {share}{memory}"
        )
