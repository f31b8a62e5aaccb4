"""Seconds of launches: the most that any of their resources needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.assembly import Compiled
from benchmarks.prediction import machine
from benchmarks.prediction.gpus import LAUNCH, Gpu
from benchmarks.prediction.programs import Extent, Work, work_of
from benchmarks.prediction.trace import Kernel, Operator

UNROLLED = 4  # bodies of a loop that ptxas puts into one, with a second loop for the rest


@dataclass
class Cost:
    """Of launches that are alike; seconds are sums over them.

    Attributes:
        name: of the kernel or operator.
        form: how the kernel is specialised, or whose operator it is.
        launches: how many.
        waves: over all multiprocessors.
        blocks: that fit on a multiprocessor at once.
        resources: seconds by resource.
        seconds: what they take.
        guessed: loops that could not be found in machine code, or whose trips depend on data.
    """

    name: str
    form: str
    launches: int = 0
    waves: float = 0.0
    blocks: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    guessed: int = 0

    @property
    def bound(self) -> str:
        """The resource that decides."""
        return max(self.resources, key=lambda name: self.resources[name], default="launch")

    def add(self, other: Cost) -> None:
        """Take in another of the kind."""
        self.launches += other.launches
        self.waves, self.blocks = max(self.waves, other.waves), other.blocks
        for name, seconds in other.resources.items():
            self.resources[name] = self.resources.get(name, 0.0) + seconds
        self.seconds += other.seconds
        self.guessed = max(self.guessed, other.guessed)


def kernel_cost(kernel: Kernel, launches: int, compiled: Compiled, gpu: Gpu) -> Cost:
    """Of so many equal launches of ours."""
    arguments = dict(kernel.arguments)
    work = timed = work_of(compiled.ttir, kernel.grid, arguments)
    programs, fit = math.prod(kernel.grid), compiled.blocks_per_processor
    if work.flattened:  # persistent: programs of the first processor make the most tiles
        timed = work_of(compiled.ttir, kernel.grid, arguments, range(0, programs, gpu.processors))
    code = machine.parse(compiled.sass, work.flattened)
    trips, guessed = _trips(code, timed)
    block = machine.simulate(code, compiled.warps, trips, gpu.tensor_cycles)
    rounds, rest = divmod(-(-programs // gpu.processors), fit)
    resources = {pipe: (rounds * fit + rest) * cycles / gpu.clock for pipe, cycles in block.busy.items()}
    busiest = max(block.busy.values())
    together = rounds * max(block.alone, fit * busiest) + max(block.alone, rest * busiest) * bool(rest)
    resources["latency"] = (rounds + bool(rest)) * block.alone / gpu.clock
    moved, cached = _moved(work, programs, arguments)
    resources["memory"], resources["L2"] = gpu.moving(moved), gpu.caching(cached)
    slowest = max(together / gpu.clock, *resources.values()) + LAUNCH
    return Cost(
        kernel.binary.name.strip("_").removesuffix("_kernel"),
        _form(kernel),
        launches,
        programs / gpu.processors / fit,
        fit,
        {name: seconds * launches for name, seconds in resources.items()},
        slowest * launches,
        guessed,
    )


def _form(kernel: Kernel) -> str:
    """Its flags and choices; sizes of tiles are left out."""
    chosen = {
        k: v for k, v in kernel.binary.constexprs.items() if v and not (type(v) is int or k == "PRECISION")
    }
    return " ".join(name if value is True else f"{name}={value}" for name, value in chosen.items())


def _trips(code: machine.Loop, work: Work) -> tuple[list[float], int]:
    """Trips of the loops of machine code, in order, and how many of them are guesses."""
    depths, trips = [depth for depth, _ in code.loops()], work.trips
    if work.flattened and depths == work.nesting == [0, 1]:
        return [trips[0], trips[1] - 1], work.unknown  # a tile's last step is its own code
    if work.flattened:
        return [1.0] * len(depths), len(depths)
    if depths == work.nesting:
        return trips, work.unknown
    if len(depths) == 2 * len(trips) and depths[::2] == depths[1::2] == work.nesting:
        return [part for count in trips for part in (count / UNROLLED, 0.0)], work.unknown
    if len(depths) < len(trips):  # the shortest were unrolled
        kept = sorted(sorted(range(len(trips)), key=lambda i: trips[i])[len(trips) - len(depths) :])
        return [trips[i] for i in kept], work.unknown
    return [1.0] * len(depths), len(depths)


def _moved(work: Work, programs: int, arguments: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes of memory, each of a tensor once where programs share it; bytes between processors and L2."""
    memory = cached = 0.0
    for part in (work.loaded, work.stored):
        for name, size in part.items():
            extent = arguments.get(name.removeprefix("%"))
            cached += size * programs
            memory += min(size * programs, extent.size if isinstance(extent, Extent) else math.inf)
    return memory, cached


def operator_cost(operator: Operator, gpu: Gpu) -> Cost:
    """Of an operator of PyTorch's: a library's products, or passes over memory."""
    resources = {"memory": gpu.moving(operator.bytes)}
    if operator.products:
        resources["tensor"] = sum(gpu.product(*product) for product in operator.products)
    seconds = max(resources.values()) + operator.launches * LAUNCH
    return Cost(operator.name, operator.kind, operator.launches, 0.0, 0, resources, seconds)
