"""One optimisation step: what it changes, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elastic_kernels import (
    ElasticBlock,
    FusedAdamW,
    kept_activations,
    linear_backend,
    planning,
    working_weights,
)
from poa.block_graphs import BlockGraphs, replaying
from poa.checkpoint import Branch, RunFolder
from poa.classifier import Classifier
from poa.config import Config, Precision
from poa.errors import InputError
from poa.health import observe
from poa.initialization import FrozenTeacher, frozen_teacher, is_run, read_source
from poa.micro_batch import AUTOCAST, MicroBatch
from poa.network import Network, StudentOutput, StudentPass, gathered, reaching_all
from poa.optim import Schedules, apply_schedules, build_optimizer, restore_optimizer, update_weights
from poa.random import torch_stream
from poa.tribranch import Centers, Targets, elastic_loss, intact_loss, teacher_targets, tribranch_loss
from poa.weights import load_strictly

Timed = Callable[[], AbstractContextManager[None]]


@dataclass
class TrainingState:
    """Everything that a step changes; with the step number it determines the rest of the run."""

    student: Network
    teacher: Network
    optimizer: torch.optim.Optimizer
    centers: Centers
    scaler: torch.amp.GradScaler
    rounded: working_weights
    frozen: FrozenTeacher | None = None
    graphs: BlockGraphs | None = None

    @classmethod
    def start(
        cls,
        config: Config,
        device: torch.device,
        initial: Initial | None = None,
        frozen: FrozenTeacher | None = None,
    ) -> TrainingState:
        """Networks and frozen teacher, by default the configuration's, and an optimiser yet to step."""
        method, initial = config.method, initial or initial_networks(config)
        frozen = frozen or frozen_teacher(method)
        student, teacher = initial.student.to(device), initial.teacher.to(device)
        teacher.requires_grad_(False)
        return cls(
            student,
            teacher,
            build_optimizer(student, teacher, method.optim, config.performance.optimizer),
            Centers.zeros(method.head.prototypes, device),
            torch.amp.GradScaler(device.type, enabled=method.precision == "fp16"),
            rounded_weights(student, teacher, method.precision),
            frozen.to(device) if frozen else None,
            BlockGraphs(device) if config.performance.cuda_graphs else None,
        )

    def zero_gradients(self) -> None:
        """Before a step; in place where graphs add to them."""
        if self.graphs is None:
            self.optimizer.zero_grad(set_to_none=True)
            return
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        if gradients := [p.grad for p in parameters if p.grad is not None]:
            torch._foreach_zero_(gradients)

    def undisturbed(self) -> AbstractContextManager[None]:
        """While it lasts, the fused optimiser writes weights rounded for the next step.

        What changes them beside steps must be such that PyTorch sees it, see `FusedAdamW.writing`.
        """
        if isinstance(self.optimizer, FusedAdamW):
            return self.optimizer.writing(self.rounded)
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "centers": [self.centers.cls, self.centers.patches],
            "scaler": self.scaler.state_dict(),
            "frozen": self.frozen.digest if self.frozen else None,
        }

    def load_state_dict(self, state: dict[str, Any], name: str) -> None:
        if self.frozen and self.frozen.digest != state.get("frozen"):
            raise InputError(
                f"{name}: expected the frozen teacher of digest {state.get('frozen')}, got "
                f"{self.frozen.source.name} of digest {self.frozen.digest}, whose weights are others now"
            )
        load_strictly(self.student, state["student"], name)
        load_strictly(self.teacher, state["teacher"], name)
        restore_optimizer(self.optimizer, state["optimizer"], name)
        for mine, theirs in zip(
            [*self.centers.cls, *self.centers.patches], sum(state["centers"], []), strict=True
        ):
            if mine.shape != theirs.shape:
                raise InputError(f"{name}: expected a center of shape {mine.shape}, got {theirs.shape}")
            mine.copy_(theirs)
        self.scaler.load_state_dict(state["scaler"])


class Initial(NamedTuple):
    """Networks before training, on the CPU, and where their weights come from."""

    student: Network
    teacher: Network
    origin: str


def initial_networks(config: Config) -> Initial:
    """Random weights, the same for both networks, or those of `method.init.weights`.

    Only those of another run differ between the two, and have heads. Raises InputError: there are no weights,
    or some of other names or shapes.
    """
    method, weights, origin = config.method, config.method.init.weights, "random"
    student = Network(method.backbone, method.head, torch_stream(method.seed, "initial weights"))
    if weights and not is_run(weights):
        source = read_source(weights, method.backbone)
        source.place_into(student.backbone)
        origin = str(source)
    teacher = deepcopy(student)
    if is_run(weights):
        branches: dict[Branch, Network] = {"student": student, "teacher": teacher}
        for branch, network in branches.items():
            trained, checkpoint = RunFolder(Path(weights)).network(branch)
            if isinstance(trained, Classifier):
                raise InputError(f"--init: expected a run of pre-training, got {weights}, of fine-tuning")
            load_strictly(network, trained.state_dict(), f"method.init.weights: {checkpoint.path}")
            origin = f"those of step {checkpoint.step:,} of {weights}"
    return Initial(student, teacher, origin)


def initial_network(config: Config, branch: Branch = "student") -> Network:
    """One of `initial_networks`."""
    networks = initial_networks(config)
    return networks.student if branch == "student" else networks.teacher


def rounded_weights(student: Network, teacher: Network, precision: Precision) -> working_weights:
    """Weights and biases of both networks' linears in the dtype of the products, where Triton reads them."""
    first = next(student.parameters())
    if precision == "fp32" or linear_backend("working_weights", first).backend != "triton":
        return working_weights([], torch.bfloat16)
    modules = [m for network in (student, teacher) for m in network.modules()]
    scaled: list[tuple[Tensor, Tensor | None, Tensor]] = []
    if precision == "bf16":  # LayerScale begins at 1e-5, which fp16 does not hold
        scaled = [layer for m in modules if isinstance(m, ElasticBlock) for layer in m.scaled_layers()]
    apart = {id(weight) for weight, _, _ in scaled}
    weights = [m.weight for m in modules if isinstance(m, nn.Linear) and id(m.weight) not in apart]
    biases = [m.bias for m in modules if isinstance(m, nn.Linear) and m.bias is not None]
    return working_weights([*weights, *biases], AUTOCAST[precision], scaled)


@dataclass(frozen=True)
class StepReport:
    """What a step tells, on the device.

    Attributes:
        values: the loss, its terms and the gradient norms before clipping; scalars, means over micro-batches.
        finite: bool scalar, the same in all processes: whether the gradients are finite. Where they are not,
            the step changed no weight.
        health: see `poa.health.observe`; empty in steps that were not observed.
    """

    values: dict[str, Tensor]
    finite: Tensor
    health: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def stacked(self) -> Tensor:
        """The values in one float32 `[values]`."""
        return torch.stack([value.float() for value in self.values.values()])


def train_step(
    model: torch.nn.Module,
    state: TrainingState,
    config: Config,
    schedules: Schedules,
    step: int,
    micro_batches: Sequence[MicroBatch],
    *,
    weight: float | None = None,
    observed: bool = False,
    timed: Timed = nullcontext,
) -> StepReport:
    """One optimisation step, in place. The teacher's logits of all micro-batches come before the first loss.

    Args:
        model: `state.student`, or what wraps it.
        weight: of a micro-batch in the mean over this process's micro-batches; other than 1 / micro_batches
            where processes have different numbers of them.
        observed: look at the health of the run too.
        timed: makes a context for each forward of the students, which waits for no other process.
    """
    method, first = config.method, micro_batches[0].batch
    weight = 1 / len(micro_batches) if weight is None else weight
    state.zero_gradients()
    names: list[str] = []
    sums: Tensor | float = 0.0
    health: dict[str, Tensor] = {}
    with state.rounded, replaying(state.graphs):
        with autocast(first.global_crops.device, method.precision):
            targets = teacher_targets(
                state.teacher,
                [micro_batch.batch for micro_batch in micro_batches],
                schedules.teacher_temperature[step],
                method.loss,
                state.centers,
                state.frozen,
            )
        for number, (micro_batch, target) in enumerate(zip(micro_batches, targets, strict=True)):
            with _reduced_later(model, later=number < len(micro_batches) - 1):
                terms, outputs = accumulate_gradients(
                    model, state, config, micro_batch, target, weight, timed
                )
            names, sums = list(terms), sums + weight * torch.stack(list(terms.values()))
            if observed:
                seen = observe(target, outputs)
                health = {name: health.get(name, 0.0) + weight * figure for name, figure in seen.items()}
    state.scaler.unscale_(state.optimizer)
    apply_schedules(state.optimizer, schedules, step)
    clip, momentum = method.optim.clip, schedules.momentum[step]
    frozen = step < schedules.teacher_start
    norms, finite = update_weights(state.optimizer, state.student, state.teacher, clip, momentum, frozen)
    state.scaler.update()
    assert isinstance(sums, Tensor)
    values = dict(zip(names, sums.unbind(), strict=True))
    return StepReport(values | {f"grad_norm.{k}": v for k, v in norms.items()}, finite, health)


def accumulate_gradients(
    model: torch.nn.Module,
    state: TrainingState,
    config: Config,
    micro_batch: MicroBatch,
    targets: Targets,
    weight: float,
    timed: Timed = nullcontext,
) -> tuple[dict[str, Tensor], list[StudentOutput]]:
    """Run both students on one micro-batch and add the gradients of its weighted loss; see `train_step`.

    Returns:
        The loss and its terms, detached, and what the students gave.
    """
    batch, losses = micro_batch.batch, config.method.loss
    precision, performance = config.method.precision, config.performance

    def run(*passes: StudentPass, **options: Any) -> list[StudentOutput]:
        kept = kept_activations(performance.keep_activations)
        with timed(), autocast(batch.global_crops.device, precision), kept:
            return model(batch, passes, performance.recompute, **options)

    def backward(loss: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        state.scaler.scale(weight * loss).backward()
        return {"loss": loss.detach(), **terms}

    if _together(config, batch.global_crops.device):
        intact, elastic = run(*micro_batch.passes)
        return backward(*tribranch_loss(intact, elastic, targets, batch, losses)), [intact, elastic]
    with _reduced_later(model, later=True):
        (intact,) = run(micro_batch.passes[0])
        prototypes, leaves = intact.prototypes, [p.detach().requires_grad_() for p in intact.prototypes]
        values = backward(*intact_loss(replace(intact, prototypes=leaves), targets, batch, losses))
    intact, prototypes = intact.detached(), gathered(prototypes, leaves)
    (elastic,) = run(micro_batch.passes[1], prototypes=prototypes)
    loss, terms = elastic_loss(intact, elastic, targets, batch, losses)
    if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
        loss = reaching_all(loss, state.student)
    others = backward(loss, terms)
    sums = {name: values[name] + others[name] for name in values.keys() & others.keys()}
    return values | others | sums, [intact, elastic]


def _together(config: Config, device: torch.device) -> bool:
    """Whether both students have one backward; by default where memory is not scarce."""
    order = config.performance.backward
    return device.type == "cpu" if order == "auto" else order == "together"


def _reduced_later(model: torch.nn.Module, later: bool) -> AbstractContextManager[None]:
    """Gradients of all but the last backward of a step stay in this process."""
    if later and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """The context in which networks run; meta tensors have no autocast, `planning` replaces it."""
    if precision == "fp32":
        return nullcontext()
    if device.type == "meta":
        return planning(AUTOCAST[precision])
    return torch.autocast(device.type, AUTOCAST[precision])
