"""The training loop of fine-tuning: each step trains the largest subnet, the smallest and random ones.

The largest subnet learns from labels, the others from its output (in-place distillation, Yu and Huang, ICCV
2019). A run of one subnet is ordinary fine-tuning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from poa.checkpoint import FINE_TUNED, RunFolder
from poa.classifier import Classifier
from poa.config import Config
from poa.data.layout import Openers
from poa.data.loader import Canvases, SampleStream, training_batches
from poa.data.sources import DataSplit
from poa.data.unreadable import Unreadable
from poa.distributed import Poll, World, init_distributed
from poa.errors import InputError
from poa.evaluate.sweep import score
from poa.evaluate.top1 import top1_of
from poa.files import write_json
from poa.finetune.images import Augmentation, mixed, stratified
from poa.finetune.options import FinetuneConfig
from poa.images import open_on_ranks
from poa.lock import RunLock
from poa.metrics import Guard, Meter, peak_gib
from poa.network import StudentPass
from poa.optim import (
    OptimConfig,
    build_optimizer,
    cosine_schedule,
    restore_optimizer,
    set_rates,
    update_weights,
)
from poa.options import from_dict, to_dict
from poa.plan import describe_data, described_device, last_lines
from poa.progress import Progress, say
from poa.random import python_stream, torch_stream
from poa.signals import StopSignals, preempted
from poa.step import StepReport, autocast
from poa.subnets import Subnet
from poa.weights import load_strictly


def finetune(
    source: RunFolder,
    config: Config,
    options: FinetuneConfig,
    out: Path,
    *,
    subnet: Subnet | None = None,
    step: int | None = None,
    openers: Openers | None = None,
) -> None:
    """Fine-tune all subnets of a run in one elastic run in `out`, or one of them alone.

    Args:
        source: the run of pre-training, whose teacher of `step`, default the newest, is fine-tuned.
        config: its configuration, with the data and the device to fine-tune on.
        openers: how to open the images, where the configuration does not name a place.

    Raises:
        InputError: data without labels or held-out images, or a folder that holds a run.
        Preempted: it was asked to stop, and was saved.
    """
    network, _ = source.network("teacher", step)
    backbone = network.backbone if subnet is None else network.backbone.to_static(subnet)
    shape: Any = backbone.config
    changes = {"drop_path": options.drop_path, "masked": False}  # nothing is masked
    shape = replace(shape, **{name: value for name, value in changes.items() if hasattr(shape, name)})
    config = replace(config, method=replace(config.method, backbone=shape))
    weights = {name: value for name, value in backbone.state_dict().items() if "mask_token" not in name}
    _run(config, options, out, weights, openers)


def resume(out: Path, config: Config | None = None, openers: Openers | None = None) -> None:
    """Go on with a run of fine-tuning from its newest checkpoint.

    Its configuration is given where its images have another name now, `openers` where they have none. Raises
    InputError: there is no checkpoint.
    """
    _run(config or RunFolder(out).config(), None, out, None, openers)


def _run(
    config: Config,
    options: FinetuneConfig | None,
    out: Path,
    weights: dict[str, Tensor] | None,
    openers: Openers | None = None,
) -> None:
    """A run to its end, in all processes; without options and weights the one that is there."""
    run = config.run
    with init_distributed(run.device, run.timeout, config.performance.threads) as world:
        lock, content = RunLock(out), None
        folder = RunFolder(out, lock)
        try:
            if options is None:
                world.from_main(lock.acquire)
                content = folder.load(world.from_main(folder.newest), config, format=FINE_TUNED)
                options = from_dict(FinetuneConfig, content["finetune"], "finetune")
            data = open_on_ranks(config, world, openers)
            trainer = Trainer(config, options, folder, data, world, content)
            if weights is not None:
                load_strictly(trainer.student.backbone, weights, "finetune")
                trainer.teacher.load_state_dict(trainer.student.state_dict())
            if content is None:
                world.from_main(folder.require_new)
                world.from_main(lock.acquire)
            trainer.begin()
            trainer.train()
        finally:
            if world.is_main:
                lock.release()


class Trainer:
    """One process's part of a run of fine-tuning: a new one, or one that goes on from a checkpoint's content.

    Nothing is written before `begin`. All images have labels.
    """

    def __init__(
        self,
        config: Config,
        options: FinetuneConfig,
        folder: RunFolder,
        data: DataSplit,
        world: World,
        content: dict[str, Any] | None = None,
    ):
        if data.test is None:
            raise InputError(f"finetune: expected held-out images with labels, got none ({data.untested})")
        method, self.config, self.options = config.method, config, options
        self.folder, self.data, self.world = folder, data, world
        self.seed = method.seed if options.seed is None else options.seed
        self.images = stratified(data.train.labelled(), options.share, self.seed)
        self.step_images = options.batch_size * world.size
        self.epoch_steps = max(len(self.images) // self.step_images, 1)
        self.total = max(round(options.epochs * self.epoch_steps), 1)
        self.every = min(max(round(options.evaluate_every * self.epoch_steps), 1), self.total)
        peak = options.lr * self.step_images / 512
        warmup = min(round(options.warmup_epochs * self.epoch_steps), self.total - 1)
        self.lr = cosine_schedule(peak, options.min_lr, self.total, warmup=warmup)
        self.augmentation = Augmentation(options, method.crops, self.seed)
        classes = data.train.classes
        self.student = Classifier(method.backbone, classes).to(world.device)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        rules = OptimConfig(layer_decay=options.layer_decay, patch_embed_lr=1.0)
        self.optimizer = build_optimizer(self.student, self.teacher, rules, config.performance.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=method.precision == "fp16")
        self.guard = Guard(world, config.run.skip_limit)
        self.unreadable = Unreadable(folder.unreadable, world, config.data.unreadable_share)
        self.best: dict[str, Any] = {"step": 0, "top1": -1.0}
        self.first = 0
        self.space = method.backbone.space
        entire = list(self.space)
        spread = np.linspace(0, len(entire) - 1, min(3, len(entire))).astype(int)
        self.evaluated = [entire[i] for i in dict.fromkeys(spread.tolist())]
        if content:
            self._take_up(content)
        self.model: torch.nn.Module = self.student

    def _take_up(self, content: dict[str, Any]) -> None:
        name = f"checkpoint of step {content['step']}"
        if content["classes"] != list(self.student.classes) or content["images"] != self.data.digest():
            raise InputError(f"{name}: expected the images and classes of this run, got others")
        if content["processes"] != self.world.size:
            raise InputError(f"{name}: expected {content['processes']} ranks, got {self.world.size}")
        load_strictly(self.student, content["student"], name)
        load_strictly(self.teacher, content["teacher"], name)
        restore_optimizer(self.optimizer, content["optimizer"], name)
        self.scaler.load_state_dict(content["scaler"])
        self.guard.load_state_dict(content["skipped"])
        self.unreadable.count = content["unreadable"]
        self.best, self.first = dict(content["best"]), content["step"]

    def begin(self) -> None:
        """Write the folder of a new run, or take up that of an old one, and say what will be done."""
        lines = [
            f"device: {described_device(self.world)}, {self.config.method.precision} products",
            f"data: {len(self.images):,} of {describe_data(self.config, self.data, 'top-1')}",
            *([f"left out: {self.data.left_out}"] if self.data.left_out else []),
            f"fine-tuning: {len(self.space)} subnets, {self.total:,} steps of {self.step_images} images; "
            + self.options.described(),
            *([f"resume: {self.first:,} of {self.total:,} steps are done"] if self.first else []),
        ]
        self.world.from_main(partial(self._begin_folder, lines))
        for line in lines if self.world.is_main else ():
            say(line)
        if self.world.size > 1:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.student, devices, gradient_as_bucket_view=True)

    def _begin_folder(self, lines: Sequence[str]) -> None:
        if self.first:
            self.folder.take_up(self.first)
            return
        self.folder.create(self.config)
        write_json(self.folder.finetuning, asdict(self.options))
        self.folder.keep_beginning(lines, {})

    def train(self) -> None:
        """All remaining steps, with logging, evaluation and checkpoints."""
        started, run = time.monotonic(), self.config.run
        meter, poll = Meter(self.world, self.step_images), Poll(self.world)
        steps = range(self.first, self.total)
        with Progress(self.total, self.first, self.world.is_main) as progress, ExitStack() as stack:
            signals = stack.enter_context(StopSignals(said=self.world.is_main))
            for step, canvases in zip(steps, meter.timed(self.batches(steps)), strict=True):
                done = step + 1
                report = self.step(step, canvases)
                meter.add(report)
                self.guard.add(done, report)
                progress.step()
                stops = poll.ask(signals.received is not None) and done < self.total
                evaluates = done % self.every == 0 or done == self.total
                if stops or evaluates or done % run.log_every == 0:
                    self.log(done, meter, progress)
                if evaluates and not stops:
                    self.evaluate(done, progress)
                if stops or evaluates:
                    self.save(done)
                    meter.reset()
                if stops:
                    raise preempted(self.folder.path, done, signals.received, "finetune")
        if self.world.is_main:
            say(f"best: step {self.best['step']} of {self.total}, mean top-1 {self.best['top1']:.1%}")
            for line in last_lines(self.folder.path, time.monotonic() - started, self.data):
                say(line)

    def batches(self, steps: range) -> Iterator[Canvases]:
        world, method = self.world, self.config.method
        rank = range(world.rank, world.rank + 1)
        stream = SampleStream(len(self.images), self.options.batch_size, rank, world.size, steps, self.seed)
        workers, transform = self.config.performance.workers, self.augmentation.transform()
        return training_batches(self.images, stream, method.canvas, workers, world.timeout, transform)

    def subnets(self, step: int) -> list[Subnet]:
        """Those of a step on this process: the largest, the smallest, and some at random."""
        dice = python_stream(self.seed, "fine-tuned subnets", step, self.world.rank)
        entire = list(self.space)
        drawn = [dice.choice(entire) for _ in range(self.options.random_subnets)]
        return list(dict.fromkeys([self.space.intact, self.space.smallest, *drawn]))

    def step(self, step: int, canvases: Canvases) -> StepReport:
        """One optimisation step on this process's images."""
        options, world = self.options, self.world
        self.unreadable.add(canvases.unreadable)
        assert self.images.labels is not None
        labels = torch.from_numpy(self.images.labels)[canvases.positions].to(world.device)
        crops = self.augmentation(canvases, world.device, step, world.rank)
        draw = torch_stream(self.seed, "mixing", step, world.rank)
        images, targets = mixed(crops, labels, len(self.student.classes), options, draw)
        passes = []
        for number, subnet in enumerate(self.subnets(step)):
            draw = torch_stream(self.seed, "fine-tuning depth", step, world.rank, number)
            drop = self.student.backbone.draw_stochastic_depth([images], subnet, draw)
            passes.append(StudentPass(subnet, drop.to(world.device) if drop else None))
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(world.device, self.config.method.precision):
            logits = [x.float() for x in self.model(images, passes)]
        losses = sandwich_losses(logits, targets, options.distill)
        loss = losses.mean()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        rate = self.lr[step]
        set_rates(self.optimizer, rate, rate, options.weight_decay)
        norms, finite = update_weights(
            self.optimizer, self.student, self.teacher, options.clip, self._decay(step)
        )
        self.scaler.update()
        values = {"loss": loss, "loss.largest": losses[0], **{f"grad_norm.{k}": v for k, v in norms.items()}}
        return StepReport({name: value.detach() for name, value in values.items()}, finite)

    def _decay(self, step: int) -> float:
        """Of the moving average, which begins with shorter means."""
        return min(self.options.ema, (1 + step) / (10 + step)) if self.options.ema else 0.0

    def log(self, done: int, meter: Meter, progress: Progress) -> None:
        """Write the means since the last log."""
        row = {"step": done, "epoch": done / self.epoch_steps, **meter.collect(), "lr": self.lr[done - 1]}
        row["skipped_steps"] = self.guard.check(done)
        row["unreadable"] = self.unreadable.settle(done, done * self.step_images)
        row["peak_gib"] = max(self.world.gather(peak_gib(self.world.device)))
        if self.world.is_main:
            self.folder.log(row)
        loss = "NaN" if row["loss"] is None else f"{row['loss']:.4f}"
        progress.show(done, {"loss": loss, "speed": f"{row['images_per_s']:.3g} img/s"})

    def evaluate(self, done: int, progress: Progress) -> None:
        """Top-1 accuracy of the smallest, a middle and the largest subnet, of the moving average."""
        protocol = top1_of(self.teacher)
        crops = self.config.method.crops
        tasks = [protocol.task(self.teacher.backbone, subnet, crops) for subnet in self.evaluated]
        with torch.no_grad():
            scores = [one["top1"] for one in score(tasks, self.data, self.config, self.world)]
        top1 = {str(subnet): value for subnet, value in zip(self.evaluated, scores, strict=True)}
        if (mean := sum(scores) / len(scores)) > self.best["top1"]:
            self.best = {"step": done, "top1": mean}
        if self.world.is_main:
            self.folder.log({"step": done, "top1": top1})
        shown = ", ".join(f"{name} {value:.1%}" for name, value in top1.items())
        progress.say(f"step {done}: top-1 accuracy: {shown}")

    def save(self, done: int) -> None:
        """Write a checkpoint; the best is kept. Raises DivergenceError: weights are NaN or inf."""
        self.folder.require_finite(done, (self.student, self.teacher), "lr")
        state = {
            "format": FINE_TUNED,
            "step": done,
            "processes": self.world.size,
            "finetune": to_dict(self.options),
            "classes": list(self.student.classes),
            "images": self.data.digest(),
            "best": self.best,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.guard.state_dict(),
            "unreadable": self.unreadable.count,
        }
        self.world.from_main(partial(self.folder.save, state, self.config, self.best["step"]))


def sandwich_losses(logits: Sequence[Tensor], targets: Tensor, distill: float) -> Tensor:
    """Cross-entropy of each subnet, the largest first, `[subnets]`, of its logits float32 `[B, classes]`.

    The largest has the targets, float32 `[B, classes]`, which sum to 1; the others
    `distill * softmax(largest) + (1 - distill) * targets`.
    """
    largest, *others = logits
    taught = torch.lerp(targets, largest.detach().softmax(1), distill)
    pairs = [(largest, targets), *((other, taught) for other in others)]
    return torch.stack([torch.nn.functional.cross_entropy(x, y) for x, y in pairs])
