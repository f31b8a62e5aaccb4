"""What a run will do in which step, and the lines that say so before it begins."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from poa.block_graphs import require_graphs
from poa.config import Config
from poa.data.sources import DataSplit
from poa.data.summary import EXAMPLES, printable
from poa.distributed import World
from poa.errors import InputError, as_input
from poa.flops import expected_masked
from poa.optim import Schedules, require_optimizer
from poa.options import differences, from_dict
from poa.progress import clock
from poa.subnets import Subnet


@dataclass(frozen=True)
class Plan:
    """What a run does in which step; kept by its checkpoints.

    Attributes:
        micro_batches: of a step, over all processes.
        epoch_steps: steps of an epoch.
        images: that are trained on.
        start: position in the endless sequence of images of what would be step 0; not 0 where the number of
            micro-batches changed on the way.
    """

    micro_batches: int
    epoch_steps: int
    images: int
    start: int = 0

    RENAMED: ClassVar[dict[str, str]] = {"chunks": "micro_batches"}  # in older checkpoints

    @classmethod
    def of(cls, config: Config, images: int, processes: int, content: dict[str, Any] | None = None) -> Plan:
        """The plan of a new run, or one resumed from `content`. Raises InputError: too many ranks."""
        plan = cls.resumed(config, content, images) if content else cls.new(config, images, processes)
        if plan.micro_batches < processes:
            raise InputError(
                f"method.micro_batches: expected one for each of {processes} ranks, got {plan.micro_batches}"
            )
        return plan

    @classmethod
    def new(cls, config: Config, images: int, processes: int) -> Plan:
        method = config.method
        micro_batches = method.micro_batches or processes
        epoch_steps = method.optim.epoch_steps or max(images // (method.batch_size * micro_batches), 1)
        return cls(micro_batches, epoch_steps, images)

    @classmethod
    def resumed(cls, config: Config, content: dict[str, Any], images: int) -> Plan:
        """As it was, unless the configuration asks for another number of micro-batches than it did."""
        with as_input("checkpoint: expected a plan"):
            before = replace(from_dict(cls, content["plan"]), images=images)
        wanted = config.method.micro_batches
        if wanted in (None, before.micro_batches, from_dict(Config, content["config"]).method.micro_batches):
            return before
        moved = content["step"] * (before.micro_batches - wanted) * config.method.batch_size
        return replace(before, micro_batches=wanted, start=before.start + moved)

    def schedules(self, config: Config) -> Schedules:
        return Schedules.build(
            config.method.optim, self.epoch_steps, self.micro_batches * config.method.batch_size
        )

    def changes(
        self, config: Config, content: dict[str, Any], data: DataSplit, processes: int
    ) -> Iterator[str]:
        """What differs from when the checkpoint was written, without keeping the run from resuming. Raises
        InputError: the run would be over."""
        yield from self.differences(from_dict(Plan, content["plan"]), (processes, content["processes"]))
        if content.get("images", images := data.digest()) != images:
            yield "names or labels of the images are others than before"
        yield from self.new_schedules(from_dict(Config, content["config"]), config, content["step"])

    def new_schedules(self, before: Config, now: Config, step: int) -> Iterator[str]:
        """Changes in the schedules of a run after `step` steps. Raises InputError: it would be over."""
        changes = [
            f"method.optim.{key} {old} -> {new}"
            for key, old, new in differences(before.method.optim, now.method.optim)
        ]
        if not changes:
            return
        old, new = self.schedules(before), self.schedules(now)
        if step > new.total_steps:
            raise InputError(f"method.optim: expected at least the {step} steps done, got {new.total_steps}")
        rates = [schedules.lr[min(step, schedules.total_steps - 1)] for schedules in (old, new)]
        yield (
            f"schedules recomputed: {', '.join(changes)}; {old.total_steps} -> {new.total_steps} steps, "
            f"learning rate {rates[0]:.3g} -> {rates[1]:.3g}"
        )

    def differences(self, before: Plan, processes: tuple[int, int]) -> Iterator[str]:
        """What is no more as it was before, given the numbers of processes now and then."""
        now, then = processes
        if (self.micro_batches, now) != (before.micro_batches, then):
            same = (
                "the same steps" if self.micro_batches == before.micro_batches else "the data order continues"
            )
            yield (
                f"resuming with {self.micro_batches} micro-batches per step on {counted(now, 'rank')} "
                f"instead of {before.micro_batches} on {then}: {same}, no image is repeated"
            )
        if self.images != before.images:
            yield f"expected {before.images:,} images as before, got {self.images:,}: their order changes"


def evaluated_subnets(config: Config) -> list[Subnet]:
    """The teacher's subnets that are scored during training."""
    space = config.method.backbone.space
    chosen = [space.require(Subnet.parse(name)) for name in config.run.knn_subnets]
    return chosen or [space.intact, space.smallest]


def require_runnable(config: Config, device: torch.device) -> None:
    """Raise InputError, before images are looked for, where a run of these options could not begin."""
    if config.performance.cuda_graphs:
        require_graphs(device)
    evaluated_subnets(config)
    require_optimizer(config.performance.optimizer)


def first_lines(
    config: Config,
    plan: Plan,
    schedules: Schedules,
    data: DataSplit,
    world: World,
    weights: str = "random",
    teacher: str = "",
) -> Iterator[str]:
    """What was found and what will be done, a line for each subject; then what is unusual."""
    method, space = config.method, config.method.backbone.space
    intact = method.backbone.parameters(space.intact)
    yield f"device: {described_device(world)}, {method.precision} products"
    yield f"data: {describe_data(config, data)}"
    if data.left_out:
        yield f"left out: {data.left_out}"
    yield (
        f"network: {len(space)} subnets from {space.smallest} to {space.intact} of a {method.backbone.kind}, "
        f"{method.backbone.parameters(space.smallest):,} to {intact:,} parameters"
    )
    images = plan.micro_batches * method.batch_size
    spread = f" ({plan.micro_batches} micro-batches over {counted(world.size, 'rank')})"
    parts = spread if plan.micro_batches > 1 else ""
    yield (
        f"steps: {schedules.total_steps:,} of {counted(images, 'image')}{parts}, "
        f"{method.optim.epochs:g} epochs of {counted(plan.epoch_steps, 'step')}"
    )
    if weights != "random":
        yield f"weights: {weights}"
    if teacher:
        yield f"teacher: {teacher}"
    marks = phases(config, plan, schedules)
    yield f"phases: {', '.join(f'{what} step {step:,}' for what, step in marks)}"
    for line in _unusual(config, plan, schedules, data, world):
        yield f"note: {line}"


def described_device(world: World) -> str:
    """`CPU, 2 threads`, or how many of which GPU."""
    if world.device.type != "cuda":
        processes = f" in each of {world.size} processes" if world.size > 1 else ""
        return f"CPU, {counted(torch.get_num_threads(), 'thread')}{processes}"
    memory = torch.cuda.get_device_properties(world.device).total_memory / 1e9
    return f"{world.size} x {torch.cuda.get_device_name(world.device)}, {memory:.0f} GB"


def describe_data(config: Config, data: DataSplit, purpose: str = "k-NN") -> str:
    """What is there to train on, and what is held out for a purpose."""
    train = data.train
    classes = " without labels"
    if train.classes:
        names = ", ".join(
            [*map(printable, train.classes[:EXAMPLES]), *["..."] * (len(train.classes) > EXAMPLES)]
        )
        classes = f" in {len(train.classes):,} classes ({names}), labels from {data.labels_from}"
        if nameless := len(train) - len(train.labelled()):
            classes += f", {nameless:,} images without one"
    held = f"{len(data.test):,} held out for {purpose}" if data.test else f"none held out ({data.untested})"
    return f"{counted(len(train), 'image')} of {printable(config.data.source)} to train on{classes}; {held}"


def phases(config: Config, plan: Plan, schedules: Schedules) -> Iterator[tuple[str, int]]:
    """What begins or ends at which step."""
    optim, steps = config.method.optim, plan.epoch_steps
    yield "learning rate rises until", round(optim.warmup_epochs * steps)
    yield "prototypes train from", round(optim.freeze_last_layer_epochs * steps)
    if optim.freeze_backbone_epochs:
        yield "backbone trains from", round(optim.freeze_backbone_epochs * steps)
    if optim.freeze_teacher_epochs:
        yield "teacher's backbone moves from", schedules.teacher_start
    if optim.teacher_temperature_epochs:
        yield "teacher temperature rises until", round(optim.teacher_temperature_epochs * steps)
    if config.method.loss.ibot and config.method.masks.probability:
        yield "masked patches (iBOT) from", schedules.ibot_start


def _unusual(
    config: Config, plan: Plan, schedules: Schedules, data: DataSplit, world: World
) -> Iterator[str]:
    """What a user may not have meant."""
    method, total = config.method, schedules.total_steps
    images, batch = len(data.train), plan.micro_batches * method.batch_size
    if world.device.type != "cuda" and method.precision != "fp32":
        yield (
            f"a GPU is expected for {method.precision} products; for a CPU there are the presets quickstart "
            "and small-images"
        )
    if images < batch:
        yield f"{images:,} images are fewer than the {batch:,} of a step: images repeat within it"
    elif plan.epoch_steps > 2 * images / batch:
        times = plan.epoch_steps * batch / images
        yield f"an epoch (method.optim.epoch_steps={plan.epoch_steps}) sees each image {times:.3g} times"
    if total > images:
        yield f"{total:,} steps are more than the {images:,} images"
    if method.canvas < method.crops.global_size:
        size = method.crops.global_size
        yield f"images are shrunk to {method.canvas} pixels (method.canvas), less than the crops' {size}"
    channels, crops = method.backbone.channels, method.crops
    if channels != 3 and (crops.grayscale or crops.jitter and (crops.saturation or crops.hue)):
        yield f"saturation, hue and grey-scale crops need 3 channels and are left out of images of {channels}"
    if not method.loss.ibot:
        yield "the masked-patch loss is off (method.loss.ibot=0)"
    elif not expected_masked(method):
        yield "no patch will be masked (method.masks), so that the masked-patch loss is zero"
    if (schedules.last_layer_lr.values[:total] == 0).all():
        yield "prototypes are never trained: method.optim.freeze_last_layer_epochs lasts for the whole run"
    if config.run.evaluate_every and data.test is None:
        yield "evaluations were asked for (run.evaluate_every), but there are no held-out images with labels"
    elif config.run.evaluate_every > total:
        yield (
            f"k-NN runs only before the first step and after the last: run.evaluate_every="
            f"{config.run.evaluate_every} is more than {counted(total, 'step')}"
        )


def counted(number: int, thing: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def last_lines(folder: Path, seconds: float, data: DataSplit) -> Iterator[str]:
    """Where the run is, and what to do with it."""
    run = shlex.quote(str(folder))
    yield f"done in {clock(seconds)}: {run}"
    yield f"next: poa report {run}"
    if data.test:
        yield f"      poa evaluate {run}"
    yield f"      poa extract {run} --subnets all"
