"""Training quality against wall time: k-NN accuracy of teacher subnets, ours and the official code.

Both start from the same weights and see the same batches of the same run; evaluation does not count as time.
From pretrained weights, the peers are what else makes small networks of them: cutting alone, in this, in the
given and in a random order, training from scratch, and distillation of the smallest subnet alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peers.official import OfficialStep, require_checkout
from benchmarks.results import Row, place
from poa.backbones import Backbone
from poa.checkpoint import RunFolder
from poa.config import Config, InitConfig, with_data
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate import REPORTED_K, knn_of_subnets
from poa.initialization import initial_config
from poa.initialization.importance import sort_by_importance
from poa.initialization.order import random_order
from poa.micro_batch import MicroBatch
from poa.network import Network, StudentPass
from poa.optim import apply_schedules, update_weights
from poa.options import override
from poa.presets import preset
from poa.random import torch_stream
from poa.step import Initial, autocast, initial_networks, train_step
from poa.subnets import Subnet
from poa.train import Trainer
from poa.tribranch import intact_loss, teacher_targets

POINTS = 4  # evaluations after the first


class Ours:
    """The trainer's step."""

    def __init__(self, run: Trainer):
        self.run = run

    def subnets(self) -> Sequence[Subnet]:
        return [self.run.space.intact, self.run.space.smallest]

    def step(self, number: int, micro_batch: MicroBatch) -> None:
        run = self.run
        train_step(run.model, run.state, run.config, run.schedules, number, [micro_batch])

    def teacher(self) -> Backbone:
        return self.run.state.teacher.backbone

    def close(self) -> None:
        """Nothing to release."""


class Alone(Ours):
    """The smallest subnet learns from the frozen source alone; other weights than its stay as they are."""

    def subnets(self) -> Sequence[Subnet]:
        return [self.run.space.smallest]

    def step(self, number: int, micro_batch: MicroBatch) -> None:
        run, batch = self.run, micro_batch.batch
        state, schedules, method = run.state, run.schedules, run.config.method
        state.optimizer.zero_grad(set_to_none=True)
        with state.rounded, autocast(run.world.device, method.precision):
            temperature = schedules.teacher_temperature[number]
            (targets,) = teacher_targets(
                state.teacher, [batch], temperature, method.loss, state.centers, state.frozen
            )
            (student,) = run.model(batch, [StudentPass(run.space.smallest)])
        loss, _ = intact_loss(student, targets, batch, replace(method.loss, intact=1.0))
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)
        apply_schedules(state.optimizer, schedules, number)
        weights = state.optimizer, state.student, state.teacher
        update_weights(*weights, method.optim.clip, schedules.momentum[number], frozen=True)
        state.scaler.update()

    def teacher(self) -> Backbone:
        return self.run.state.student.backbone


class Official(Ours):
    """The official step on the same batches, schedules and subnets."""

    def __init__(self, run: Trainer, checkout: Path):
        super().__init__(run)
        method = run.config.method
        self.official = OfficialStep(checkout, method, run.world.device)
        self.official.load_from(run.state.student)
        self.official.start_optimizer(method.optim)
        print("    official code, patched:", *self.official.patches, sep="\n        ")
        self.network = Network(method.backbone, method.head).to(run.world.device)

    def step(self, number: int, micro_batch: MicroBatch) -> None:
        schedules, official = self.run.schedules, self.official
        rates = schedules.lr, schedules.last_layer_lr, schedules.weight_decay
        official.set_rates(*(values[number] for values in rates))
        official.step(
            micro_batch.batch,
            self.run.sampler.draw(number, 0),
            schedules.teacher_temperature[number],
            schedules.momentum[number],
            self.run.config.method.optim.clip,
            ibot=number >= schedules.ibot_start,
        )

    def teacher(self) -> Backbone:
        self.official.load_into(self.network, "teacher")
        return self.network.backbone

    def close(self) -> None:
        self.official.close()


def run(
    name: str,
    data: str,
    device: torch.device,
    minutes: float,
    official: Path | None,
    init: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Row]:
    """Train for so many minutes each and evaluate on the way, on data as of `poa pretrain --data`. Raises
    ValueError: the data has no classes to evaluate on, `official` is no checkout of the official code, or
    `init` no weights to start from."""
    if official is not None:
        require_checkout(official)
    if init is not None:
        return _from_pretrained(with_data(initial_config(name, init, overrides), data), device, minutes * 60)
    config = with_data(override(preset(name), overrides), data)
    makers: dict[str, Callable[[Trainer], Ours]] = {"ours": Ours}
    if official is not None:
        makers["official"] = lambda run: Official(run, official)
    else:
        print("    official     not measured: no checkout was named with --official")
    rows = []
    for which, make in makers.items():
        rows += _train(which, make, config, device, minutes * 60)
    return rows


def _from_pretrained(config: Config, device: torch.device, seconds: float) -> list[Row]:
    """Our run and its peers. The first accuracies of ours are those of cutting by importance alone."""
    method = config.method
    if not method.backbone.sortable:
        raise InputError(f"--init: expected weights of a ViT or ResNet, got a {method.backbone.kind}'s")
    given = replace(config, method=replace(method, init=replace(method.init, importance="none")))
    scratch = replace(config, method=replace(method, init=InitConfig()))
    rows = _train("ours", Ours, config, device, seconds)
    rows += _train("given order", Ours, given, device, 0.0)
    rows += _train("random order", Ours, given, device, 0.0, shuffled=True)
    rows += _train("scratch", Ours, scratch, device, seconds)
    return rows + _train("alone", Alone, config, device, seconds)


def _start(config: Config, folder: Path, device: torch.device, shuffled: bool) -> Trainer:
    """A run before its first step, its pretrained weights in order."""
    data, world, initial = config.open(), World(0, 1, device), initial_networks(config)
    if data.test is None:
        raise InputError(f"--data: expected class folders to evaluate on, got {config.data.source}")
    if config.method.init.importance != "none":
        config, _ = sort_by_importance(config, initial, data, world)
    elif shuffled:
        config = _shuffle(config, initial)
    return Trainer(config, RunFolder(folder), data, world, initial=initial)


def _shuffle(config: Config, initial: Initial) -> Config:
    order = random_order(initial.teacher.backbone, torch_stream(config.method.seed, "random order"))
    for network in (initial.student, initial.teacher):
        order.sort(network)
    backbone = config.method.backbone.changed(block_order=tuple(order.blocks))
    return replace(config, method=replace(config.method, backbone=backbone))


def _train(
    which: str,
    make: Callable[[Trainer], Ours],
    config: Config,
    device: torch.device,
    seconds: float,
    shuffled: bool = False,
) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        whole = _start(config, Path(folder), device, shuffled)
        trainer = stack.enter_context(closing(make(whole)))
        rows, spent, images, due = [], 0.0, 0, 0.0
        steps = range(whole.schedules.total_steps)
        for number, (canvases,) in zip(steps, whole.batches(steps), strict=True):
            if spent >= due:
                rows += _evaluate(which, trainer, whole, spent, images)
                due += seconds / POINTS
            if spent >= seconds:
                break
            started = time.perf_counter()
            trainer.step(number, whole.prepare(number, 0, canvases))
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent += time.perf_counter() - started
            images += config.method.batch_size
        else:
            rows += _evaluate(which, trainer, whole, spent, images)
    return rows


def _evaluate(which: str, trainer: Ours, whole: Trainer, seconds: float, images: int) -> list[Row]:
    subnets = trainer.subnets()
    limit = whole.config.run.knn_images
    scores = knn_of_subnets(trainer.teacher(), subnets, whole.data, whole.config, whole.world, limit)
    assert scores is not None
    shown = ", ".join(f"{s} {score[REPORTED_K]:.1%}" for s, score in zip(subnets, scores, strict=True))
    print(f"    {which:14}{seconds:8.1f} s {images:8} images  {shown}", flush=True)
    return [
        {
            "op": "quality",
            "provider": which,
            "mode": str(subnet),
            "shape": whole.config.data.source,
            "dtype": whole.config.method.precision,
            "seconds": seconds,
            "images": images,
            "accuracy": score[REPORTED_K],
            "k": REPORTED_K,
            **place(whole.world.device.type),
        }
        for subnet, score in zip(subnets, scores, strict=True)
    ]
