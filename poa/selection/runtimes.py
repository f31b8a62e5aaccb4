"""What runs a subnet when its latency is measured, and timing of calls that take turns."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from poa.errors import InputError, one_line
from poa.export import ExportedModel, export_file
from poa.export.formats import onnx_runner
from poa.random import python_stream

K = TypeVar("K")
Call = Callable[[], object]
Runtime = Callable[[ExportedModel, Tensor], Call]
"""From a model and normalised images `[B, C, S, S]`, both on the device, to a call of one forward."""

WARM, CALLS = 2, 4  # calls of a turn that are not timed, and then that are
ROUNDS = (10, 200)  # at least, at most
QUIET = 20  # calls that suffice for a median and a 95th percentile


def _torch(model: ExportedModel, images: Tensor) -> Call:
    return lambda: model(images)


def _compile(model: ExportedModel, images: Tensor) -> Call:
    """Compiled by itself for these images; PyTorch's limits of recompilations are meant for one network."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    try:
        compiled(images)
    except Exception as error:
        raise InputError(
            f"--runtime: expected a network that torch.compile takes on this machine, got: {one_line(error)}"
        ) from error
    return lambda: compiled(images)


def _onnxruntime(model: ExportedModel, images: Tensor) -> Call:
    if images.device.type != "cpu":
        raise InputError(f"--runtime: expected onnxruntime on a CPU, got --device {images.device.type}")
    with tempfile.TemporaryDirectory() as folder:
        run = onnx_runner(export_file(model, Path(folder), "onnx"))
    return lambda: run(images)


RUNTIMES: dict[str, Runtime] = {"torch": _torch, "compile": _compile, "onnxruntime": _onnxruntime}


@dataclass
class Times:
    """Milliseconds of calls: `quiet` ones, and those in which other processes took a CPU away."""

    quiet: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    @property
    def are_quiet(self) -> bool:
        return len(self.quiet) >= QUIET

    @property
    def counted(self) -> list[float]:
        """Those that tell of the network rather than of its neighbours: the quiet ones, if these suffice."""
        return self.quiet if self.are_quiet else self.quiet + self.disturbed


def interleaved(calls: Mapping[K, Call], device: torch.device, seconds: float) -> dict[K, Times]:
    """Times of single calls, each of which has run before, that take turns, so that a drift of the machine
    hits all.

    In every round each has one turn, in random order: `WARM` calls that are not timed, which bring its
    weights back into the caches, and `CALLS` that are. Each is measured for so many seconds, within `ROUNDS`.
    """
    times = {key: Times() for key in calls}
    least, most = ROUNDS
    bar = tqdm(range(most), desc="latency", unit="round", leave=False, disable=None)
    end = time.perf_counter() + seconds * len(calls)
    for number in bar:
        if number >= least and time.perf_counter() > end:
            break
        order = list(calls)
        python_stream(0, "latency", number).shuffle(order)
        for key in order:
            for _ in range(WARM):
                _timed(calls[key], device)
            for _ in range(CALLS):
                spent, switches = _timed(calls[key], device)
                (times[key].disturbed if switches else times[key].quiet).append(spent)
    bar.close()
    return times


def _timed(call: Call, device: torch.device) -> tuple[float, int]:
    """Milliseconds of a call, and how often a thread of this process lost its CPU to another process."""
    switches, start = _switches(), time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start), _switches() - switches


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
