"""What a run tells about itself: means over steps, skipped steps, times, alarms, and the rows they make."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from poa.checkpoint import RunFolder
from poa.config import Config
from poa.data.unreadable import Unreadable
from poa.distributed import World
from poa.errors import DivergenceError
from poa.flops import datasheet_peak, expected_masked, workload
from poa.health import Watch
from poa.optim import Schedules
from poa.options import to_dict
from poa.plan import Plan
from poa.progress import Progress
from poa.step import StepReport
from poa.subnets import SubnetSampler
from poa.writers import Writer, flat, open_writers

T = TypeVar("T")
Callback = Callable[[dict[str, Any]], None]
"""Called with each row of `metrics.jsonl`: logged steps, evaluations (`knn`) and alarms."""


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
        self.sums: Tensor | None = None  # of values and how often they were finite, [2, values]
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
        self.names = list(report.values)
        finite = report.stacked.isfinite()
        counted = torch.stack([torch.where(finite, report.stacked, 0.0), finite.float()])
        self.sums = counted if self.sums is None else self.sums + counted
        self.skipped = self.skipped + (~report.finite).float()
        self.health = report.health or self.health
        self.steps += 1

    def collect(self) -> dict[str, Any]:
        """Means over steps and processes, share of skipped steps, seconds since the start, images a second,
        share of time waiting. The mean of what never was finite is None."""
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
        """How many steps were skipped so far. Raises DivergenceError: too many in a row; the message names
        the first, and what was NaN or inf in it on which rank. Raised in all processes."""
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


class Journal:
    """The rows of a run, and the alarms in them: what is counted in steps, written every so often."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        world: World,
        plan: Plan,
        schedules: Schedules,
        sampler: SubnetSampler,
        callbacks: Sequence[Callback] = (),
        frozen_flops: int = 0,
    ):
        method = config.method
        self.config, self.folder, self.world = config, folder, world
        self.plan, self.schedules, self.sampler = plan, schedules, sampler
        self.callbacks, self.frozen_flops = callbacks, frozen_flops
        self.step_images = plan.micro_batches * method.batch_size
        self.meter = Meter(world, self.step_images)
        self.guard = Guard(world, config.run.skip_limit)
        self.stopwatch = Stopwatch(world.device)
        start = round(method.optim.warmup_epochs * plan.epoch_steps)
        self.watch = Watch(method.batch_size, start, heads=method.loss.through_heads)
        self.unreadable = Unreadable(folder.unreadable, world, config.data.unreadable_share)
        self.host_seconds = 0.0  # since the last log
        self.writers: list[Writer] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.guard.state_dict(),
            "watch": self.watch.state_dict(),
            "unreadable": self.unreadable.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guard.load_state_dict(state["skipped"])
        self.watch.load_state_dict(state["watch"])
        self.unreadable.count = state["unreadable"]

    @contextmanager
    def opened(self, first_step: int) -> Iterator[None]:
        """Where rows also go to what `run.log_to` names."""
        names = self.config.run.log_to if self.world.is_main else ()
        with ExitStack() as stack:
            self.writers = open_writers(names, self.folder.path, to_dict(self.config), first_step)
            for writer in self.writers:
                stack.callback(writer.close)
            yield

    def add(self, done: int, report: StepReport) -> None:
        self.meter.add(report)
        self.guard.add(done, report)

    def log(self, done: int, compilations: int, progress: Progress) -> None:
        """Write the means since the last log after `done` steps, and alarms; `progress` shows them, too.

        `compilations` counts the kernels that Triton compiled since the start. Raises DivergenceError: the
        loss is NaN or inf, or too many steps in a row were skipped.
        """
        steps = range(done - self.meter.steps, done)
        row = {"step": done, **self.meter.collect(), "lr": self.schedules.lr[done - 1]}
        row |= self._speed(steps, row["images_per_s"]) | {"compilations": compilations}
        row["skipped_steps"] = self.guard.check(done)
        row["unreadable"] = self.unreadable.settle(done, self.plan.start + done * self.step_images)
        loss = row["loss"]
        if loss is None and row["skipped"] < 1:
            raise DivergenceError(
                f"step {done}: the loss is NaN or inf, though gradients are finite; "
                "lower method.optim.base_lr"
            )
        self.write(row)
        shown = {
            "loss": "NaN" if loss is None else f"{loss:.4f}",
            "speed": f"{row['images_per_s']:.3g} img/s",
            "data wait": f"{row['data_wait']:.0%}",
        }
        if row["skipped"]:
            shown["skipped"] = f"{row['skipped']:.0%}"
        if row["unreadable"]:
            shown["unreadable"] = str(row["unreadable"])
        progress.show(done, shown)
        for alarm, figures in self.watch.look(done, {k: v for k, v in row.items() if isinstance(v, float)}):
            self.write({"step": done, "alarm": alarm.name, "figures": figures, "advice": alarm.advice})
            progress.say(f"step {done}: ALARM: {alarm.name} ({figures}): {alarm.advice}")

    def _speed(self, steps: range, images_per_s: float) -> dict[str, Any]:
        """What these steps were, how balanced and how fast.

        `rank_seconds` is the time of the students' forward passes in a step, of each process; `host_ms` that
        in which this process starts a step, which on a GPU should be less than the step's.
        """
        method, count = self.config.method, self.plan.micro_batches
        host, self.host_seconds = self.host_seconds, 0.0
        return {
            **workload(
                method,
                [[self.sampler.draw(step, number) for number in range(count)] for step in steps],
                [expected_masked(method) * (step >= self.schedules.ibot_start) for step in steps],
                [self.world.share(count, rank) for rank in range(self.world.size)],
                images_per_s,
                datasheet_peak(self.world.device),
                self.frozen_flops,
            ),
            "rank_seconds": self.world.gather(self.stopwatch.collect() / len(steps)),
            "host_ms": host / len(steps) * 1e3,
            "peak_gib": max(self.world.gather(peak_gib(self.world.device))),
        }

    def write(self, row: dict[str, Any]) -> None:
        """Put a row into the metrics and wherever else they go."""
        if not self.world.is_main:
            return
        self.folder.log(row)
        for writer in self.writers:
            writer.write(row["step"], {k: v for k, v in flat(row).items() if k != "step"})
        for callback in self.callbacks:
            callback(dict(row))
