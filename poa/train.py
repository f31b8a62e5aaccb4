"""The training loop: one process or many, plain torch DDP."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from elastic_kernels import compilations
from poa.checkpoint import RunFolder, log
from poa.config import Config, InitConfig
from poa.data.layout import Openers
from poa.data.loader import Canvases, SampleStream, training_batches
from poa.data.sources import DataSplit
from poa.device import deterministic_algorithms, prepared_ahead
from poa.distributed import Poll, World, init_distributed, mean_in_bf16
from poa.errors import as_input
from poa.images import open_on_ranks
from poa.initialization import FrozenTeacher, frozen_teacher
from poa.initialization.importance import sort_by_importance
from poa.lock import RunLock
from poa.metrics import Callback, Journal
from poa.micro_batch import Draws, MicroBatch, make_micro_batch
from poa.options import describe
from poa.plan import Plan, first_lines, last_lines, phases, require_runnable
from poa.progress import Progress, say
from poa.signals import StopSignals, preempted
from poa.step import Initial, StepReport, TrainingState, initial_networks, train_step
from poa.subnets import SubnetSampler
from poa.validation import Validation
from poa.writers import require_writers

# Options that may differ between ranks.
LOCAL = {"data.source", "run.device", "performance.workers", "performance.threads"}


def pretrain(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    check: bool = False,
    openers: Openers | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train a run to its end; first say what was found and what will be done, last what to do next.

    Args:
        out: the run folder; new, or with `resume` one with a checkpoint, whose newest is continued.
        check: only say it, and write nothing.
        openers: how to open the images, where the configuration does not name a place.
        callbacks: called on the main process with every line of the metrics.

    Raises:
        InputError: data, device, folder or checkpoint cannot be used; nothing is written then.
        DivergenceError: losses or gradients became NaN or inf.
        PeerError: another process is dead or does not respond.
        Preempted: a signal asked it to stop, and the run was saved.
    """
    require_writers(config.run.log_to)
    repeats = deterministic_algorithms(config.performance.deterministic)
    with (
        repeats,
        init_distributed(config.run.device, config.run.timeout, config.performance.threads) as world,
    ):
        lock = RunLock(out)
        try:
            folder = RunFolder(out, lock)
            content = _content(config, folder, world, resume, check)
            require_runnable(config, world.device)
            world.require_same(
                "options", {key: value for key, _, value, _ in describe(config) if key not in LOCAL}
            )
            data = open_on_ranks(config, world, openers)
            _train(config, folder, world, data, content, check, callbacks)
        finally:
            if world.is_main:
                lock.release()


def _content(
    config: Config, folder: RunFolder, world: World, resume: bool, check: bool
) -> dict[str, Any] | None:
    """That of the checkpoint to resume, whose run is locked; None for a new run."""
    if not resume:
        return None
    assert folder.lock
    if not check:
        world.from_main(folder.lock.acquire)
    return folder.load(world.from_main(folder.newest), config)


def _train(
    config: Config,
    folder: RunFolder,
    world: World,
    data: DataSplit,
    content: dict[str, Any] | None,
    check: bool,
    callbacks: Sequence[Callback],
) -> None:
    """Everything that may hold the process group, gone when this returns."""
    assert folder.lock
    plan = Plan.of(config, len(data.train), world.size, content)
    schedules = plan.schedules(config)
    read = not content and (config.method.init.weights or not check)
    initial, frozen = initial_networks(config) if read else None, frozen_teacher(config.method)
    origin, teacher = initial.origin if initial else "random", str(frozen or "")
    beginning = list(first_lines(config, plan, schedules, data, world, origin, teacher))
    changes: list[str] = []
    if content:
        with as_input(f"checkpoint of step {content['step']}: expected that of this run"):
            changes += (
                f"step {content['step']}: {line}" for line in plan.changes(config, content, data, world.size)
            )
    going_on = [f"resume: {content['step']:,} of {schedules.total_steps:,} steps are done"] if content else []
    for line in [*beginning, *going_on] if world.is_main else ():
        say(line)
    for line in changes if world.is_main else ():
        log.warning("%s", line)
    if check:
        return
    started, order = time.monotonic(), None
    if initial and config.method.init.importance != "none":
        config, order = sort_by_importance(config, initial, data, world)
    run = Trainer(config, folder, data, world, content, callbacks, initial, frozen)
    if not content:
        world.from_main(folder.lock.acquire)
    run.begin()
    if order:
        world.from_main(partial(folder.keep_order, vars(order)))
    world.from_main(partial(folder.keep_beginning, beginning, dict(phases(config, plan, schedules))))
    run.train()
    if (skipped := int(run.journal.guard.counts[0])) and world.is_main:
        log.warning(
            "%d of %d steps were skipped, because gradients were NaN or inf", skipped, schedules.total_steps
        )
    for line in last_lines(folder.path, time.monotonic() - started, data) if world.is_main else ():
        say(line)


class Trainer:
    """One process's part of a run: a new one, or one that goes on from the content of a checkpoint.

    Nothing is written before `begin`. Callbacks are called on the main process with every line of the
    metrics. `initial` are the networks of a new run, and `frozen` is another teacher; default those of its
    configuration.

    Raises:
        InputError: more ranks than micro-batches, or a checkpoint that does not fit.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        data: DataSplit,
        world: World,
        content: dict[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        initial: Initial | None = None,
        frozen: FrozenTeacher | None = None,
    ):
        method = config.method
        self.config, self.folder, self.data, self.world = config, folder, data, world
        self.plan = Plan.of(config, len(data.train), world.size, content)
        self.space = method.backbone.space
        self.micro_batches = world.share(self.plan.micro_batches)
        self.schedules = self.plan.schedules(config)
        self.sampler = SubnetSampler(
            self.space, method.sampling, method.seed, self.plan.micro_batches, method.backbone.flops
        )
        random = replace(config, method=replace(method, init=InitConfig())) if content else config
        self.state = TrainingState.start(random, world.device, initial, frozen)
        flops = self.state.frozen.flops if self.state.frozen else 0
        self.journal = Journal(
            config, folder, world, self.plan, self.schedules, self.sampler, callbacks, flops
        )
        self.images = data.digest()
        self.first_step = 0
        if content:
            with as_input(f"checkpoint of step {content['step']}: expected that of this run"):
                self._take_up(content)
        self.model: torch.nn.Module = self.state.student

    def _take_up(self, content: dict[str, Any]) -> None:
        self.first_step = content["step"]
        self.state.load_state_dict(content, f"checkpoint of step {self.first_step}")
        self.journal.load_state_dict(content)

    def begin(self) -> None:
        """Write the folder of a new run, or take up that of an old one."""
        self.world.from_main(self._begin_folder)
        self.wrap()

    def wrap(self) -> None:
        """Let DDP reduce the gradients of several processes."""
        if self.world.size > 1:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            self.model = wrapped = DistributedDataParallel(
                self.state.student, device_ids=devices, gradient_as_bucket_view=True
            )
            if self.config.method.reduce_dtype == "bf16":
                wrapped.register_comm_hook(self.world.size, mean_in_bf16)

    def _begin_folder(self) -> None:
        if self.first_step == 0:
            self.folder.create(self.config)
            return
        self.folder.take_up(self.first_step)
        self.folder.keep_config(self.config)

    def train(self) -> None:
        """All remaining steps, with logging, evaluation and checkpoints."""
        total, options = self.schedules.total_steps, self.config.run
        journal, meter, poll = self.journal, self.journal.meter, Poll(self.world)
        validation = Validation(self.config, self.data, self.world, journal)
        with Progress(total, self.first_step, self.world.is_main) as progress, ExitStack() as stack:
            signals = stack.enter_context(StopSignals(said=self.world.is_main))
            compiled = stack.enter_context(compilations())
            stack.enter_context(self.state.undisturbed())
            stack.enter_context(journal.opened(self.first_step))
            if self.world.from_main(partial(validation.is_missing, self.first_step, total)):
                validation.run(self.first_step, self.state, progress)
            meter.reset()
            steps = range(self.first_step, total)
            for step, canvases in zip(steps, meter.timed(self.batches(steps)), strict=True):
                done = step + 1
                logs, saves, evaluates = (
                    every > 0 and (done % every == 0 or done == total)
                    for every in (options.log_every, options.save_every, options.evaluate_every)
                )
                logs = logs or saves or evaluates
                report = self.step(step, canvases, observed=logs)
                journal.add(done, report)
                progress.step()
                stops = poll.ask(signals.received is not None) and done < total
                if logs or stops:
                    journal.log(done, compiled.count, progress)
                    self.state.rounded.forget()  # callbacks may do anything
                if evaluates and not stops:
                    validation.run(done, self.state, progress)
                if saves or stops:
                    self.save(done)  # last, as what comes before would not be repeated
                if stops:
                    raise preempted(self.folder.path, done, signals.received)
                if saves or evaluates:
                    meter.reset()  # neither counts as training time

    def batches(self, steps: range) -> Iterator[list[Canvases]]:
        """Decoded images of this process's micro-batches, step by step."""
        method, source = self.config.method, self.data.train
        stream = SampleStream(
            len(source),
            method.batch_size,
            self.micro_batches,
            self.plan.micro_batches,
            steps,
            method.seed,
            self.plan.start,
            method.shuffle_block,
        )
        workers = self.config.performance.workers
        loaded = training_batches(source, stream, method.canvas, workers, self.world.timeout)
        return iter(lambda: list(itertools.islice(loaded, len(self.micro_batches))), [])

    def step(self, step: int, canvases: Sequence[Canvases], observed: bool = False) -> StepReport:
        """One optimisation step on this process's micro-batches."""
        started = time.perf_counter()
        micro_batches = prepared_ahead(
            self.world.device,
            lambda: [self.prepare(step, *pair) for pair in zip(self.micro_batches, canvases, strict=True)],
        )
        weight = self.world.size / self.plan.micro_batches  # DDP takes the mean over processes
        report = train_step(
            self.model,
            self.state,
            self.config,
            self.schedules,
            step,
            micro_batches,
            weight=weight,
            observed=observed,
            timed=self.journal.stopwatch.running,
        )
        self.journal.host_seconds += time.perf_counter() - started
        return report

    def prepare(self, step: int, micro_batch: int, canvases: Canvases) -> MicroBatch:
        """The micro-batch that training sees of decoded images."""
        method = self.config.method
        self.journal.unreadable.add(canvases.unreadable)
        return make_micro_batch(
            method,
            self.state.student,
            canvases.images.to(self.world.device, non_blocking=True),
            canvases.sizes,
            self.sampler.draw(step, micro_batch),
            Draws.of(method.seed, step, micro_batch),
            masked=step >= self.schedules.ibot_start and method.loss.ibot > 0,
        )

    def save(self, done: int) -> None:
        """Write a checkpoint. Raises DivergenceError: weights are NaN or inf, in all processes alike."""
        self.folder.require_finite(done, (self.state.student, self.state.teacher), "method.optim.base_lr")

        def write() -> None:
            state = {
                "step": done,
                "processes": self.world.size,
                "images": self.images,
                "plan": vars(self.plan),
                **self.journal.state_dict(),
                **self.state.state_dict(),
            }
            self.folder.save(state, self.config)

        self.world.from_main(write)
