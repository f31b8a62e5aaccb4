"""Measure providers of an operator side by side: gate, warm-up, interleaved timing, peak memory.

Every provider must first pass the gate: its output and every gradient are as good as naive PyTorch's in the
same dtype, against float64. Those that fail, or cannot run here, are listed with the reason and not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy import excess_error
from benchmarks.failures import Event, Failures, Refused, Trying, Unavailable
from benchmarks.results import Row, place
from benchmarks.roofline import Ceilings
from benchmarks.timing import MEASURE, Samples, Timed, interleaved, quantiles, timed
from poa.flops import DATASHEET_PEAKS

MODES = ("fwd", "bwd", "fwd+bwd")
TRUTH = "naive"  # the provider whose float64 result is the truth, and which every gate is relative to

Provider = Callable[..., Tensor]


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
    ours = results_of(provider, problem.leaves, problem.trains, upstream(low["output"]))
    for name, value in ours.items():
        wrong = excess_error(value.to(low[name].dtype), low[name], truth[name])
        if wrong:
            return f"{name}: {wrong}"
    return None


def run(
    problem: Problem,
    ceilings: Ceilings | None,
    only: Collection[str] = (),
    seconds: float = MEASURE,
    without: Collection[str] = (),
) -> Iterator[Event]:
    """Measure a problem; yields rows as they come, and the providers that fail.

    Ceilings of the device give the share of the floor; None leaves it out. Each of the named providers,
    default all, and modes is measured for so many seconds. Raises DeviceLost: a provider left the device
    unusable.
    """
    failures, ready = Failures(), {}
    low, truth = truth_of(problem)
    for name, make in problem.providers.items():
        if name in without or (only and name not in only):
            continue
        yield Trying(name)
        with failures.of(name):
            ready[name] = make()
            wrong = gate(problem, ready[name], low, truth)
            if wrong:
                raise Unavailable(wrong)
    yield Trying("")
    del low, truth
    memory = {}
    for name in failures.spared(ready):
        with failures.of(name):
            call = functools.partial(results_of, ready[name], problem.leaves, problem.trains)
            memory[name] = peak_mib(call, problem.device)
    for mode in problem.modes:
        calls = {}
        for name in failures.spared(ready):
            with failures.of(name):
                calls[name] = call_of(ready[name], problem, mode)
        for name, samples in interleaved(calls, problem.device, seconds, failures).items():
            yield _row(problem, name, mode, samples, memory[name], ceilings)
    for name, reason in failures.items():
        yield Refused(name, reason)


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


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Memory of a call beyond what there is before it, in MiB; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _row(
    problem: Problem, provider: str, mode: str, samples: Samples, mib: float | None, ceilings: Ceilings | None
) -> Row:
    spread = quantiles(samples.seconds)
    seconds, moved = spread["p50"] / 1e6, problem.bytes[mode]
    flops = problem.flops * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]
    row: Row = {
        "op": problem.op,
        "provider": provider,
        "mode": mode,
        "shape": problem.shape,
        "dtype": str(problem.dtype).removeprefix("torch."),
        **spread,
        "unhidden": samples.unhidden / len(samples.seconds),
        "gb_per_s": moved / seconds / 1e9,
        "tflop_per_s": flops / seconds / 1e12,
        "peak_mib": mib,
        **place(problem.device.type),
    }
    if ceilings is not None:
        row["share_of_floor"] = max(flops / ceilings.matmul, moved / ceilings.copy) / seconds
    return row


@functools.lru_cache
def ceilings_of(device: torch.device, seconds: float = MEASURE) -> Ceilings:
    """Measure a large bf16 product and a device copy."""
    cuda = device.type == "cuda"
    size, count = (8192, 1 << 30) if cuda else (512, 1 << 24)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"product": timed(lambda: a @ b), "copy": timed(lambda: target.copy_(source))}
    times = {name: min(taken.seconds) for name, taken in interleaved(calls, device, seconds).items()}
    peak = DATASHEET_PEAKS.get(torch.cuda.get_device_name() if cuda else "")
    return Ceilings(
        2 * size**3 / times["product"],
        2 * count / times["copy"],
        peak,
        f"measured: {size}^3 bf16 product, copy of {count >> 20} MiB",
    )
