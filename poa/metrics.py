"""What a run tells about itself: means over steps, skipped steps, and where the figures go."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from poa.config import Destination
from poa.distributed import World
from poa.errors import DivergenceError, InputError
from poa.files import write_text
from poa.step import StepReport

T = TypeVar("T")


class Meter:
    """Means over the steps since the last `collect`, summed on the device without waiting for it.

    NaN and inf do not count. What the newest observed step saw of its health comes with the
    means.
    """

    def __init__(self, world: World, step_images: int):
        self.world = world
        self.step_images = step_images
        self.started = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; the clock starts now."""
        self.names: list[str] = []
        self.sums: Tensor | None = None  # of values and how often they were numbers, [2, values]
        self.skipped: Tensor | float = 0.0
        self.health: dict[str, Tensor] = {}
        self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches on and count the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def add(self, report: StepReport) -> None:
        """Count one step."""
        self.names = list(report.values)
        numbers = report.stacked.isfinite()
        counted = torch.stack([torch.where(numbers, report.stacked, 0.0), numbers.float()])
        self.sums = counted if self.sums is None else self.sums + counted
        self.skipped = self.skipped + (~report.finite).float()
        self.health = report.health or self.health
        self.steps += 1

    def collect(self) -> dict[str, Any]:
        """Means over steps and processes, share of skipped steps, seconds since the start, images a second,
        share of time waiting. The mean of what never was a number is None."""
        assert self.sums is not None and isinstance(self.skipped, Tensor)
        scalars = torch.stack([self.skipped / self.steps, *(v.float() for v in self.health.values())])
        sums, counts, (skipped, *health) = (
            part.tolist()
            for part in self.world.mean(torch.cat([self.sums.flatten(), scalars])).split(
                [len(self.names), len(self.names), len(scalars)]
            )
        )
        row: dict[str, Any] = {
            name: value / count if count else None
            for name, value, count in zip(self.names, sums, counts, strict=True)
        }
        row |= {"skipped": skipped, **dict(zip(self.health, health, strict=True))}
        now = time.perf_counter()
        seconds = now - self.since
        row["seconds"] = now - self.started
        row["images_per_s"] = self.steps * self.step_images / seconds
        row["data_wait"] = self.waited / seconds
        self.reset()
        return row


class Stopwatch:
    """Seconds of a part of the work of this process alone: by a GPU's own clock, or of processor time, which
    grows with the threads and not with the wait for a core."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        start = self._now()
        yield
        self.laps.append((start, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def collect(self) -> float:
        """The sum since the last call; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            total = sum(start.elapsed_time(end) for start, end in self.laps) / 1e3
        else:
            total = sum(end - start for start, end in self.laps)
        self.laps = []
        return total


def peak_gib(device: torch.device) -> float:
    """The most memory this process has used: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Guard:
    """Counts the steps that were skipped because gradients are NaN or inf, and ends a run that skips on.

    Gradients are reduced before they are judged, so that all processes agree on every step. Everything is
    counted on the device; `check` alone waits for it.
    """

    def __init__(self, world: World, limit: int):
        self.world = world
        self.limit = limit
        self.names: list[str] = []
        # Skipped steps, those in a row, and the first of these.
        self.counts = torch.zeros(3, dtype=torch.int64, device=world.device)
        self.bad = torch.zeros(0, dtype=torch.bool, device=world.device)

    def add(self, step: int, report: StepReport) -> None:
        """Count a step; `step` is its number from 1."""
        if not self.names:
            self.names = list(report.values)
            self.bad = torch.zeros(len(self.names), dtype=torch.bool, device=self.world.device)
        skipped = ~report.finite
        total, row, first = self.counts
        begins = skipped & (row == 0)
        self.bad = torch.where(begins, ~report.stacked.isfinite(), self.bad)
        self.counts = torch.stack(
            [total + skipped, torch.where(skipped, row + 1, 0), torch.where(begins, step, first)]
        )

    def check(self, step: int) -> int:
        """How many steps were skipped so far.

        Raises:
            DivergenceError: too many in a row; the message names the first, and what was NaN or inf in it on
                which rank. Raised in all processes.
        """
        total, row, first = self.counts.tolist()
        if row < self.limit:
            return total
        mine = [name for name, is_bad in zip(self.names, self.bad.tolist(), strict=True) if is_bad]
        lost = [name for name in mine if not name.startswith("grad_norm.")]
        bad = [
            f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(self.world.gather(lost)) if names
        ]
        raise DivergenceError(
            f"step {step}: the last {row} steps were skipped, because gradients are NaN or inf since step "
            f"{first}; NaN or inf in that step: {'; '.join(bad) or 'no loss on any rank, only gradients'}. "
            "Weights are those of the last good step; lower method.optim.base_lr, warm up longer, or use "
            "method.precision=bf16 instead of fp16"
        )

    def state_dict(self) -> list[int]:
        return self.counts.tolist()

    def load_state_dict(self, counts: list[int]) -> None:
        self.counts.copy_(torch.tensor(counts))


class Writer(Protocol):
    """Somewhere figures go, besides `metrics.jsonl`."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures after a step, by dotted names."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases named as the folder; one that goes on keeps its identity."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        file = folder / "wandb.id"
        if not file.exists():
            write_text(file, wandb.util.generate_id())
        name = folder.resolve().name
        self.run = wandb.init(
            project="poa", name=name, dir=folder, id=file.read_text(), resume="allow", config=dict(config)
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


def require_writers(names: tuple[Destination, ...]) -> None:
    """Raise InputError for what is not installed, before a run begins."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"run.log_to: expected {name} to be installed; pip install {name}")


def open_writers(
    names: tuple[Destination, ...], folder: Path, config: Mapping[str, Any], first_step: int
) -> list[Writer]:
    """The writers of a run that begins after `first_step` steps."""
    made: dict[str, Any] = {
        "tensorboard": lambda: TensorBoard(folder, first_step),
        "wandb": lambda: Wandb(folder, config),
    }
    return [made[name]() for name in names]


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row by dotted names; lists give their mean and largest."""
    figures: dict[str, float] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            figures |= flat(value, f"{name}.")
        elif isinstance(value, list) and value:
            figures |= {f"{name}.mean": sum(value) / len(value), f"{name}.max": max(value)}
        elif isinstance(value, int | float):
            figures[name] = value
    return figures
