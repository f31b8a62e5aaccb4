"""The training loop: one process or many, plain torch DDP."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from poa.checkpoint import RunFolder
from poa.config import Config, Precision
from poa.data.augment import augment
from poa.data.loader import Canvases, SampleStream, training_batches
from poa.data.masking import Masks, draw_masks
from poa.data.sources import DataSplit, open_data
from poa.distributed import World, world
from poa.errors import InputError
from poa.evaluate import REPORTED_K, knn_of_subnets
from poa.multicrop import draw_stochastic_depth
from poa.optim import Schedules, apply_schedules, build_optimizer, restore_optimizer, update_weights
from poa.progress import Progress
from poa.random import python_stream, torch_stream
from poa.subnets import SubnetSampler
from poa.tribranch import (
    VIEWS,
    Batch,
    Centers,
    Network,
    StudentPass,
    teacher_targets,
    tribranch_loss,
)
from poa.weights import load_strictly

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingState:
    """Everything that a step changes; with the step number it determines the rest of the run."""

    student: Network
    teacher: Network
    optimizer: torch.optim.Optimizer
    centers: Centers
    scaler: torch.amp.GradScaler

    @classmethod
    def start(cls, config: Config, device: torch.device) -> TrainingState:
        """Networks as the seed initialises them; the teacher begins as a copy of the student."""
        method = config.method
        student = initial_network(config).to(device)
        teacher = Network(method.backbone, method.head).to(device).requires_grad_(False)
        teacher.load_state_dict(student.state_dict())
        return cls(
            student,
            teacher,
            build_optimizer(student, teacher, method.optim, config.performance.optimizer),
            Centers.zeros(method.head.prototypes, device),
            torch.amp.GradScaler(device.type, enabled=method.precision == "fp16"),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "centers": [self.centers.cls, self.centers.patches],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], name: str) -> None:
        load_strictly(self.student, state["student"], name)
        load_strictly(self.teacher, state["teacher"], name)
        restore_optimizer(self.optimizer, state["optimizer"], name)
        for mine, theirs in zip(
            [*self.centers.cls, *self.centers.patches], sum(state["centers"], []), strict=True
        ):
            mine.copy_(theirs)
        self.scaler.load_state_dict(state["scaler"])


def initial_network(config: Config) -> Network:
    """The network before training, a function of the configuration alone."""
    generator = torch_stream(config.method.seed, "initial weights")
    return Network(config.method.backbone, config.method.head, generator)


def pretrain(config: Config, out: Path, *, resume: bool = False) -> None:
    """Train a run to its end.

    Args:
        config: of the run.
        out: the run folder; new, or with `resume` one with a checkpoint.
        resume: go on from the checkpoint.

    Raises:
        InputError: data, device, folder or checkpoint cannot be used; nothing is written then.
    """
    if config.performance.threads:
        torch.set_num_threads(config.performance.threads)
    with world(config.run.device) as here:
        data = open_data(config.run.data, config.run.holdout, config.method.seed)
        _train(Run(config, RunFolder(out), data, here), resume)


def _train(run: Run, resume: bool) -> None:
    run.begin(resume)
    run.train()


class Run:
    """One process's part of a run.

    Args:
        config: of the run.
        folder: of the run; nothing is written before `begin`.
        data: images to train on, and to test on.
        here: this process; it trains the chunk with the number of its rank.
    """

    def __init__(self, config: Config, folder: RunFolder, data: DataSplit, here: World):
        method = config.method
        self.config, self.folder, self.data, self.here = config, folder, data, here
        self.space = method.backbone.space
        images = method.batch_size * here.size
        epoch_steps = method.optim.epoch_steps or max(len(data.train) // images, 1)
        self.schedules = Schedules.build(method.optim, epoch_steps, images)
        self.sampler = SubnetSampler(
            self.space, method.sampling, method.seed, here.size, method.backbone.flops
        )
        self.state = TrainingState.start(config, here.device)
        self.model: torch.nn.Module = self.state.student
        self.first_step = 0

    def begin(self, resume: bool) -> None:
        """Write the folder of a new run, or read the checkpoint of an old one."""
        if resume:
            self._continue(self.folder.load(self.config))
        elif self.here.is_main:
            self.folder.create(self.config)
        if self.here.size > 1:
            devices = [self.here.device] if self.here.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.state.student, device_ids=devices)

    def _continue(self, content: dict[str, Any]) -> None:
        if content["processes"] != self.here.size:
            raise InputError(
                f"resume: expected {content['processes']} processes as before, got {self.here.size}"
            )
        self.state.load_state_dict(content, str(self.folder.checkpoint))
        self.first_step = content["step"]
        if self.here.is_main:
            self.folder.forget_metrics_after(self.first_step)

    def train(self) -> None:
        """All remaining steps, with logging, evaluation and checkpoints."""
        total, options = self.schedules.total_steps, self.config.run
        meter = Meter(self.here, self.config.method.batch_size)
        with Progress(total, self.first_step, self.here.is_main) as progress:
            if self.first_step == 0 and options.evaluate_every:
                self.evaluate(0, progress)
            steps = range(self.first_step, total)
            for step, canvases in zip(steps, meter.timed(self.batches(steps)), strict=True):
                meter.add(self.step(step, canvases))
                progress.step()
                done = step + 1
                logs, saves, evaluates = (
                    every > 0 and (done % every == 0 or done == total)
                    for every in (options.log_every, options.save_every, options.evaluate_every)
                )
                if logs or saves or evaluates:
                    self.log(done, meter, progress)
                if saves:
                    self.save(done)
                if evaluates:
                    self.evaluate(done, progress)
                if saves or evaluates:
                    meter.reset()  # neither counts as training time

    def batches(self, steps: range) -> Iterator[Canvases]:
        """Decoded images of this process, a batch per step."""
        method, source = self.config.method, self.data.train
        stream = SampleStream(
            len(source), method.batch_size, self.here.rank, self.here.size, steps, method.seed
        )
        workers = self.config.performance.workers
        return iter(training_batches(source, stream, method.canvas, workers))

    def step(self, step: int, canvases: Canvases) -> dict[str, Tensor]:
        """One optimisation step; returns losses and gradient norms, on the device."""
        batch = self.prepare(step, canvases)
        passes = self.student_passes(step, batch)
        return train_step(self.model, self.state, self.config, self.schedules, step, batch, passes)

    def prepare(self, step: int, canvases: Canvases) -> Batch:
        """Augment decoded images on the device and draw the masks of the step."""
        method, chunk = self.config.method, self.here.rank
        images, sizes = canvases
        images = images.to(self.here.device, non_blocking=True)
        draw = torch_stream(method.seed, "augment", step, chunk)
        global_crops, local_crops = augment(images, sizes, method.crops, draw)
        side = method.backbone.grid(method.crops.global_size)
        crops = VIEWS * len(images)
        masks = Masks.none(crops, side * side)
        if step >= self.schedules.ibot_start and method.loss.ibot:
            dice = python_stream(method.seed, "masks", step, chunk)
            masks = draw_masks(crops, (side, side), method.masks.probability, method.masks.ratio, dice)
        return Batch(global_crops, local_crops, masks.to(self.here.device))

    def student_passes(self, step: int, batch: Batch) -> list[StudentPass]:
        """The intact student and this chunk's elastic one, with their stochastic depth."""
        method, chunk = self.config.method, self.here.rank
        backbone = self.state.student.backbone
        shapes = [batch.global_crops, batch.local_crops][: 2 if batch.local_views else 1]
        groups = tuple((len(c), 1 + method.backbone.grid(c.shape[-1]) ** 2) for c in shapes)
        passes = []
        for number, subnet in enumerate((self.space.intact, self.sampler.draw(step, chunk))):
            draw = torch_stream(method.seed, "stochastic depth", step, chunk, number)
            drop = draw_stochastic_depth(groups, backbone.drop_rates(subnet), draw)
            passes.append(StudentPass(subnet, drop.to(self.here.device) if drop else None))
        return passes

    def log(self, done: int, meter: Meter, progress: Progress) -> None:
        """Write the means since the last log; stop a run whose loss or gradients are no numbers.

        With a loss scale (fp16) some steps are skipped by design.
        """
        row = {"step": done, **meter.collect(), "lr": self.schedules.lr[done - 1]}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"step {done}: the loss is {row['loss']}; lower method.optim.base_lr, "
                "or use method.precision=bf16 instead of fp16"
            )
        if row["skipped"] and not self.state.scaler.is_enabled():
            raise FloatingPointError(
                f"step {done}: the gradients were no numbers in {row['skipped']:.0%} of the steps since the "
                "last line of metrics; lower method.optim.base_lr"
            )
        if self.here.is_main:
            self.folder.log(row)
        speed, wait = f"{row['images_per_s']:.3g} img/s", f"{row['data_wait']:.0%}"
        progress.show(done, {"loss": f"{row['loss']:.4f}", "speed": speed, "data wait": wait})

    def save(self, done: int) -> None:
        """Replace the checkpoint."""
        if self.here.is_main:
            state = {"step": done, "processes": self.here.size, **self.state.state_dict()}
            self.folder.save(state, self.config)

    def evaluate(self, done: int, progress: Progress) -> None:
        """k-NN of the teacher's extremes and of the intact student."""
        if self.data.test is None or not self.here.is_main:
            return
        extremes = [self.space.intact, self.space.smallest]
        limit = self.config.run.knn_images
        teacher = knn_of_subnets(self.state.teacher.backbone, extremes, self.data, self.config, limit)
        (student,) = knn_of_subnets(self.state.student.backbone, extremes[:1], self.data, self.config, limit)
        scores = {
            f"teacher {extremes[0]}": teacher[0][REPORTED_K],
            f"teacher {extremes[1]}": teacher[1][REPORTED_K],
            f"student {extremes[0]}": student[REPORTED_K],
        }
        self.folder.log({"step": done, "knn": {"k": REPORTED_K, **scores}})
        shown = "  ".join(f"{name} {score:.1%}" for name, score in scores.items())
        progress.say(f"step {done}: {REPORTED_K}-NN accuracy: {shown}")


def train_step(
    model: torch.nn.Module,
    state: TrainingState,
    config: Config,
    schedules: Schedules,
    step: int,
    batch: Batch,
    passes: Sequence[StudentPass],
) -> dict[str, Tensor]:
    """One optimisation step of a chunk, in place.

    Args:
        model: `state.student`, or what wraps it.
        state: of the training.
        config: of the run.
        schedules: of the run.
        step: number of the step.
        batch: the chunk.
        passes: the intact student and the elastic one.

    Returns:
        The loss, its terms, the gradient norms before clipping, and whether the step was skipped because they
        are no numbers; detached, on the device.
    """
    method = config.method
    with autocast(batch.global_crops.device, method.precision):
        temperature = schedules.teacher_temperature[step]
        targets = teacher_targets(state.teacher, batch, temperature, method.loss, state.centers)
        intact, elastic = model(batch, passes, config.performance.recompute)
    loss, terms = tribranch_loss(intact, elastic, targets, batch, method.loss)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    apply_schedules(state.optimizer, schedules, step)
    clip, momentum = method.optim.clip, schedules.momentum[step]
    norms, finite = update_weights(state.optimizer, state.student, state.teacher, clip, momentum)
    state.scaler.update()
    skipped = {"skipped": (~finite).float()}
    return {"loss": loss.detach(), **terms} | {f"grad_norm.{k}": v for k, v in norms.items()} | skipped


class Meter:
    """Means over the steps since the last `collect`, summed on the device without waiting for it."""

    def __init__(self, here: World, batch_size: int):
        self.here = here
        self.batch_size = batch_size
        self.started = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; the clock starts now."""
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def timed(self, batches: Iterator[Canvases]) -> Iterator[Canvases]:
        """Pass batches on and count the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def add(self, values: dict[str, Tensor]) -> None:
        """Count one step."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.float()
        self.steps += 1

    def collect(self) -> dict[str, float]:
        """Means over steps and processes, seconds since the start, images a second, share of time waiting."""
        means = self.here.mean(torch.stack(list(self.sums.values())) / self.steps).tolist()
        row = dict(zip(self.sums, means, strict=True))
        now = time.perf_counter()
        seconds = now - self.since
        row["seconds"] = now - self.started
        row["images_per_s"] = self.steps * self.batch_size * self.here.size / seconds
        row["data_wait"] = self.waited / seconds
        self.reset()
        return row


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """The context in which networks run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])
