"""Schedules, parameter groups, gradient clipping and the teacher's moving average.

Source: official `CosineScheduler`, `get_params_groups_with_decay`, `do_train`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from elastic_kernels import FusedAdamW
from poa.classifier import Classifier
from poa.errors import InputError
from poa.network import Network
from poa.options import Options, option

Trained = Network | Classifier
OptimizerKind = Literal["fused", "torch", "apex"]
DURATIONS = (
    "warmup_epochs",
    "freeze_last_layer_epochs",
    "freeze_backbone_epochs",
    "teacher_temperature_epochs",
    "ibot_start_epoch",
)
# What cannot be planned again in the middle of a run: the rest are schedules.
FIXED = ("epoch_steps", "beta1", "beta2", "layer_decay", "patch_embed_lr", "freeze_backbone_epochs")
MOST_STEPS = 10_000_000  # of a run; the paper's has 276,800


@dataclass(frozen=True)
class OptimConfig(Options, at="method.optim"):
    """AdamW, its schedules and the teacher's. Durations are epochs and may be fractions."""

    epochs: float = option(300.0, "length of the run in epochs", "(0, 1e6]")
    epoch_steps: int | None = option(None, "steps per epoch; none: images / images per step", "[1, 1e7]")
    base_lr: float = option(4e-3, "learning rate at the peak, before lr_scaling", "(0, 100]")
    lr_scaling: Literal["sqrt", "none"] = option(
        "sqrt", "sqrt: multiply the learning rate by sqrt(images per step / 1024)"
    )
    min_lr: float = option(2e-5, "learning rate at the end of the cosine schedule", "[0, 100]")
    warmup_epochs: float = option(10.0, "epochs of the linear warm-up of the learning rate", "[0, 1e6]")
    freeze_last_layer_epochs: float = option(1.0, "epochs with frozen prototypes (last layer)", "[0, 1e6]")
    freeze_backbone_epochs: float = option(
        0.0, "epochs in which the backbone is frozen, so that new heads fit pretrained features", "[0, 1e6]"
    )
    freeze_teacher_epochs: float = option(
        0.0, "epochs with a frozen teacher backbone (heads follow); as many as epochs: always", "[0, 1e6]"
    )
    weight_decay: float = option(0.04, "weight decay at the first step", "[0, 100]")
    weight_decay_end: float = option(0.4, "weight decay at the end of the cosine schedule", "[0, 100]")
    beta1: float = option(0.9, "beta1 of AdamW", "[0, 1)")
    beta2: float = option(0.999, "beta2 of AdamW", "[0, 1)")
    layer_decay: float = option(0.9, "layer-wise learning-rate decay per block, towards the input", "(0, 1]")
    patch_embed_lr: float = option(0.2, "additional learning-rate factor of the patch embedding", "[0, 100]")
    clip: float = option(1.5, "gradient clipping norm, of backbone and heads apart; 0: none", "[0, 1e6]")
    stretch: float = option(
        0.78, "cosine schedules are made for a run 1/stretch times as long, and cut off", "[0.01, 1]"
    )
    momentum: float = option(0.992, "momentum of the teacher's EMA at the first step", "[0, 1]")
    momentum_end: float = option(
        0.9999, "momentum of the teacher's moving average (EMA) at the end of the cosine schedule", "[0, 1]"
    )
    teacher_temperature: float = option(0.07, "softmax temperature of the teacher", "[0.0001, 100]")
    teacher_temperature_start: float = option(
        0.04, "softmax temperature of the teacher at the start of its linear warm-up", "[0.0001, 100]"
    )
    teacher_temperature_epochs: float = option(30.0, "warm-up epochs of the teacher temperature", "[0, 1e6]")
    ibot_start_epoch: float = option(30.0, "epoch from which patches are masked (iBOT loss)", "[0, 1e6]")

    def require_durations(self, ibot: bool) -> None:
        """Raise InputError where a phase would not be over, or not begin, before the run ends.

        The message gives durations of the same proportions that fit: the longest a tenth of the run, as in
        the published recipe. Where `ibot` has no weight, it need not begin.
        """
        durations = {name: getattr(self, name) for name in DURATIONS if ibot or name != "ibot_start_epoch"}
        if all(value < self.epochs or value == 0 for value in durations.values()):
            return
        scale = self.epochs / max(durations.values()) / 10
        fits = {name: float(f"{scale * value:.3g}") for name, value in durations.items()}
        fit = " ".join(f"{self.at}.{name}={value}" for name, value in fits.items())
        long = ", ".join(f"{name} {value:g}" for name, value in durations.items() if value >= self.epochs)
        raise InputError(
            f"{self.at}: expected every phase to end before epochs {self.epochs:g}, got {long}; "
            f"these would fit: {fit}"
        )


@dataclass(frozen=True)
class Schedule:
    """A value per step, and the one that holds from the end on."""

    values: np.ndarray
    final: float

    def __getitem__(self, step: int) -> float:
        return float(self.values[step]) if step < len(self.values) else self.final


def cosine_schedule(
    base: float,
    final: float,
    total: int,
    *,
    warmup: int = 0,
    start: float = 0.0,
    freeze: int = 0,
    stretch: float = 1.0,
) -> Schedule:
    """Zeros for `freeze` steps, a linear warm-up from `start` that includes `base`, then a cosine towards
    `final`.

    The cosine is as long as if the run had `int(total / stretch)` steps and is cut at `total`, so with a
    stretch below 1 the last value is far from `final`, which holds from `total` on.
    """
    length = int(total / stretch) - warmup - freeze
    steps = np.arange(min(length, max(total - warmup - freeze, 0)))
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(length, 1)))
    parts = (np.zeros(freeze), np.linspace(start, base, warmup), cosine)
    return Schedule(np.concatenate(parts)[:total], final)


@dataclass(frozen=True)
class Schedules:
    """All values that change from step to step."""

    total_steps: int
    ibot_start: int
    teacher_start: int
    lr: Schedule
    backbone_lr: Schedule
    last_layer_lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    teacher_temperature: Schedule

    @classmethod
    def build(cls, config: OptimConfig, epoch_steps: int, images_a_step: int) -> Schedules:
        """Schedules of a run; `images_a_step`, over all ranks, are for the learning-rate rule."""

        def steps(epochs: float) -> int:
            return round(epochs * epoch_steps)

        total = max(steps(config.epochs), 1)
        if total > MOST_STEPS:
            raise InputError(
                f"{config.at}.epochs: expected at most {MOST_STEPS:,} steps, got {config.epochs:g} epochs of "
                f"{epoch_steps:,} steps"
            )
        peak = config.base_lr
        if config.lr_scaling == "sqrt":
            peak *= math.sqrt(images_a_step / 1024)
        cosine = partial(cosine_schedule, total=total, stretch=config.stretch)
        lr = cosine(peak, config.min_lr, warmup=steps(config.warmup_epochs))

        def frozen(epochs: float) -> Schedule:
            values = lr.values.copy()
            values[: steps(epochs)] = 0
            return Schedule(values, lr.final)

        warm = min(steps(config.teacher_temperature_epochs), MOST_STEPS)
        return cls(
            total_steps=total,
            ibot_start=steps(config.ibot_start_epoch),
            teacher_start=steps(config.freeze_teacher_epochs),
            lr=lr,
            backbone_lr=frozen(config.freeze_backbone_epochs),
            last_layer_lr=frozen(config.freeze_last_layer_epochs),
            weight_decay=cosine(config.weight_decay, config.weight_decay_end),
            momentum=cosine(config.momentum, config.momentum_end),
            teacher_temperature=cosine_schedule(
                config.teacher_temperature,
                config.teacher_temperature,
                warm,
                warmup=warm,
                start=config.teacher_temperature_start,
            ),
        )


def parameter_groups(
    network: Trained, layer_decay: float, patch_embed_lr: float, apart: bool = False
) -> list[dict[str, Any]]:
    """AdamW parameter groups: `params`, `names`, `lr_multiplier`, `wd_multiplier`, `last_layer` (prototypes).

    Where backbone and heads are `apart`, groups have `backbone`, too.

    The learning rate decays from block to block, counted on the intact depth; the patch embedding gets one
    more factor. Biases, norms and LayerScale have no weight decay; tokens, positions and prototype gains do
    (official).
    """
    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        part, _, local = name.partition(".")
        lr = layer_decay ** network.backbone.layers_above(local) if part == "backbone" else 1.0
        if local.startswith("patch_embed."):
            lr *= patch_embed_lr
        undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
        key = (lr, 0.0 if undecayed else 1.0, ".prototypes." in name, apart and part == "backbone")
        fields = zip(("lr_multiplier", "wd_multiplier", "last_layer", "backbone"), key, strict=True)
        group = groups.setdefault(key, {"params": [], "names": [], **dict(fields)})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(
    student: Trained, teacher: Trained, config: OptimConfig, kind: OptimizerKind = "fused"
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; `apply_schedules` sets its rates before every step.

    The fused one writes the teacher, the moving average of the student, too.
    """
    apart = config.freeze_backbone_epochs > 0
    groups = parameter_groups(student, config.layer_decay, config.patch_embed_lr, apart)
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": 1e-8}
    if kind == "fused":
        parts = {name: part.parameters() for name, part in student.named_children()}
        averages: dict[Tensor, Tensor] = dict(zip(student.parameters(), teacher.parameters(), strict=True))
        return FusedAdamW(groups, **options, parts=parts, averages=averages)
    if kind == "torch":
        on_gpu = next(student.parameters()).is_cuda
        return torch.optim.AdamW(groups, **options, fused=on_gpu)
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, **options, adam_w_mode=True)


def require_optimizer(kind: OptimizerKind) -> None:
    """Raise InputError if apex is requested and not installed."""
    try:
        if kind == "apex":
            importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise InputError(
            f"performance.optimizer: expected NVIDIA's apex for 'apex', but it does not import: {error}"
        ) from None


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], name: str) -> None:
    """Load the state of an AdamW, also of one that ran in another way. Raises InputError: it was apex's and
    this one is not, or the reverse; they count steps differently."""
    mine, theirs = "bias_correction" in optimizer.defaults, "bias_correction" in state["param_groups"][0]
    if mine != theirs:
        kinds = ("PyTorch's or the fused", "apex's")
        raise InputError(
            f"{name}: expected the state of {kinds[mine]} optimizer, got {kinds[theirs]}; "
            "resume with the performance.optimizer it was saved with"
        )
    how = {k: v for k, v in optimizer.defaults.items() if k in ("foreach", "fused", "capturable")}
    groups = [group | how for group in state["param_groups"]]
    optimizer.load_state_dict(state | {"param_groups": groups})


def update_weights(
    optimizer: torch.optim.Optimizer,
    student: Trained,
    teacher: Trained,
    clip: float,
    momentum: float,
    frozen: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip, step and move the teacher by its momentum; gradients that are NaN or inf change no weight.

    Backbone and heads are clipped apart, to the norm `clip`; 0: not at all. Only the heads of a `frozen`
    teacher move. Returns the gradient norms before clipping, and whether all are finite; on the device.
    """
    average, averaged = (teacher.head, student.head) if frozen else (teacher, student)
    if isinstance(optimizer, FusedAdamW):
        heads_alone = len(optimizer.averages) < sum(len(g["params"]) for g in optimizer.param_groups)
        if frozen != heads_alone:
            optimizer.set_averages(dict(zip(averaged.parameters(), average.parameters(), strict=True)))
        optimizer.step(max_norm=clip or None, momentum=momentum)
        return optimizer.norms, optimizer.finite
    norms = clip_gradients(student, clip)
    finite = torch.stack(list(norms.values())).isfinite().all()
    if optimizer.defaults.get("fused"):  # PyTorch's obeys a flag on the device
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()
    update_teacher(average, averaged, momentum)
    return norms, finite


def apply_schedules(optimizer: torch.optim.Optimizer, schedules: Schedules, step: int) -> None:
    """Set learning rate and weight decay of every group for a step."""
    rates = schedules.lr[step], schedules.last_layer_lr[step], schedules.weight_decay[step]
    set_rates(optimizer, *rates, schedules.backbone_lr[step])


def set_rates(
    optimizer: torch.optim.Optimizer,
    lr: float,
    last_layer_lr: float,
    weight_decay: float,
    backbone_lr: float | None = None,
) -> None:
    """Multiply the given rates into every group; `backbone_lr` (default `lr`) where backbones are apart."""
    for group in optimizer.param_groups:
        rate = last_layer_lr if group["last_layer"] else lr
        if group.get("backbone") and backbone_lr is not None:  # groups of older checkpoints lack it
            rate = backbone_lr
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def clip_gradients(network: nn.Module, largest: float) -> dict[str, Tensor]:
    """Clip the gradient norm of the backbone and of the heads, each on its own; return the norms before."""
    norms = {}
    for name, part in network.named_children():
        limit = largest if largest > 0 else math.inf
        norms[name] = nn.utils.clip_grad_norm_(part.parameters(), limit)
    return norms


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of the teacher: `teacher = m * teacher + (1 - m) * student`."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
