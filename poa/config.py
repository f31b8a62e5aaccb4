"""The configuration of a run.

`method` and `data` are what changes results; `performance` must not change them; `run` says what happens
around the training, and neither results nor speed depend on it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from poa.backbones import BackboneOptions, ViTConfig
from poa.data.crops import CropsConfig
from poa.data.layout import Openers
from poa.data.sources import DataConfig, DataSplit
from poa.errors import InputError
from poa.heads import HeadConfig
from poa.losses import LossConfig
from poa.masks import MaskConfig
from poa.optim import OptimConfig, OptimizerKind
from poa.options import Options, option, section

Precision = Literal["fp32", "bf16", "fp16"]
Destination = Literal["tensorboard", "wandb"]
MOST_IMAGES = 65536  # of a micro-batch
MOST_PARAMETERS = 10_000_000_000  # fp32 weights, teacher, gradients and moments of which take 200 GB


@dataclass(frozen=True)
class InitConfig(Options, at="method.init"):
    """The initial weights."""

    weights: str = option(
        "", "initial weights: run folder, timm:NAME, model folder or file; empty: random weights"
    )
    importance: Literal["none", "taylor"] = option(
        "none", "order of channels, heads and blocks: as it is, or by Taylor scores"
    )
    images: int = option(512, "training images of which importance is scored", "[1, 1e6]")


@dataclass(frozen=True)
class TeacherConfig(Options, at="method.teacher"):
    """A teacher besides the moving average of the student."""

    frozen: str = option(
        "", "weights that feature distillation follows, named as init.weights; empty: the teacher's own"
    )
    frozen_size: int = option(0, "side in pixels of the frozen teacher's crops; 0: its own", "[0, 4096]")


@dataclass(frozen=True)
class MethodConfig(Options, at="method"):
    """Everything that changes results."""

    seed: int = option(0, "seed of every random choice", "[0, 4294967295]")
    batch_size: int = option(64, "images per micro-batch, on one rank", f"[1, {MOST_IMAGES}]")
    micro_batches: int | None = option(
        None, "micro-batches per step over all ranks, accumulated by fewer; none: one per rank", "[1, 65536]"
    )
    reduce_dtype: Literal["fp32", "bf16"] = option(
        "fp32", "dtype of the gradient all-reduce; bf16 rounds gradients and halves the traffic"
    )
    precision: Precision = option("bf16", "dtype of the matrix products; weights and loss are fp32")
    sampling: Literal["per-rank", "shared", "balanced"] = option(
        "per-rank", "elastic subnets of a step: one per micro-batch, one for all, or one each of similar cost"
    )
    shuffle_block: int = option(
        1, "images per block of the shuffle, for storage with slow random access", "[1, 1e9]"
    )
    canvas: int = option(256, "decoded images are shrunk to fit a square of this many pixels", "[8, 16384]")
    init: InitConfig = section(InitConfig(), "the initial weights")
    backbone: BackboneOptions = section(ViTConfig(), "the elastic network")
    head: HeadConfig = section(HeadConfig(), "the projection heads")
    loss: LossConfig = section(LossConfig(), "the loss")
    crops: CropsConfig = section(CropsConfig(), "crops and augmentation")
    masks: MaskConfig = section(MaskConfig(), "masks of patches")
    optim: OptimConfig = section(OptimConfig(), "optimiser, schedules and teacher")
    teacher: TeacherConfig = section(TeacherConfig(), "another, frozen teacher")

    def check(self) -> None:
        if self.init.importance != "none" and not self.backbone.sortable:
            raise self.init.wrong("importance", f"none for a {self.backbone.kind}")
        if self.teacher.frozen and not self.loss.features:
            raise self.loss.wrong("features", "a weight above 0 with method.teacher.frozen")
        if self.crops.global_size != self.backbone.image_size:
            raise self.crops.wrong("global_size", f"method.backbone.image_size {self.backbone.image_size}")
        channels = self.backbone.channels
        for name in ("mean", "std"):
            if len(getattr(self.crops, name)) != channels:
                expected = f"a value for each of the {channels} channels, as poa data stats prints them"
                raise self.crops.wrong(name, expected)
        if self.crops.local_count:
            self.backbone.grid(self.crops.local_size)
        self.optim.require_durations(ibot=self.loss.ibot > 0)
        parameters = self.backbone.parameters(self.backbone.space.intact) + self.head.parameters(
            self.backbone.feature_width(self.backbone.space.intact)
        )
        if parameters > MOST_PARAMETERS:
            raise InputError(f"method: expected at most {MOST_PARAMETERS:,} parameters, got {parameters:,}")


@dataclass(frozen=True)
class PerformanceConfig(Options, at="performance"):
    """Everything that changes speed and memory only."""

    workers: int = option(
        4, "decoding processes per rank, at most one per CPU; 0: the training process decodes", "[0, 1024]"
    )
    recompute: bool = option(False, "activation checkpointing: less memory, more time")
    keep_activations: bool = option(
        False, "keep activations of MLPs for the backward on GPUs: less time, more memory"
    )
    backward: Literal["auto", "together", "apart"] = option(
        "auto", "both students in one backward, or apart, which takes less memory; auto: apart on GPUs"
    )
    deterministic: bool = option(False, "only algorithms whose results repeat bitwise")
    optimizer: OptimizerKind = option(
        "fused", "fused: AdamW, clipping and EMA of the teacher in one pass; or AdamW of PyTorch or apex"
    )
    cuda_graphs: bool = option(
        False, "replay the blocks of a ViT as CUDA graphs: less time of the host, more memory"
    )
    threads: int | None = option(
        None, "CPU threads of PyTorch; none: OMP_NUM_THREADS, or one on a CPU if that is not set", "[1, 1024]"
    )

    def check(self) -> None:
        if self.cuda_graphs and self.recompute:
            raise self.wrong("recompute", "false with performance.cuda_graphs=true")
        if self.cuda_graphs and self.backward == "together":
            raise self.wrong("backward", "auto or apart with performance.cuda_graphs=true")


@dataclass(frozen=True)
class RunConfig(Options, at="run"):
    """What happens around the training."""

    device: str = option("auto", "device to train on: auto, cpu, cuda or cuda:N")
    log_every: int = option(20, "steps between lines of metrics.jsonl and of progress", "[1, 1e9]")
    save_every: int = option(1000, "steps between checkpoints; the last step is always saved", "[1, 1e9]")
    keep_last: int = option(2, "number of newest checkpoints that are kept", "[1, 1e6]")
    keep_every: int = option(0, "steps between checkpoints that are kept for good; 0: none are", "[0, 1e9]")
    evaluate_every: int = option(1000, "steps between k-NN evaluations; 0: never", "[0, 1e9]")
    knn_images: int = option(10000, "at most this many bank and query images of k-NN in training", "[1, 1e9]")
    knn_subnets: tuple[str, ...] = option(
        (), "teacher subnets in these k-NN evaluations, such as 384x12,192x6; none: largest and smallest"
    )
    knn_drop: float = option(
        1.0, "the run stops if the intact teacher's k-NN accuracy falls this far below its start", "[0, 1]"
    )
    skip_limit: int = option(30, "skipped steps (NaN or inf gradients) in a row that stop a run", "[1, 1e9]")
    timeout: float = option(
        600.0, "seconds without a response from another rank after which contact counts as lost", "[1, 1e6]"
    )
    log_to: tuple[Destination, ...] = option((), "loggers besides metrics.jsonl: tensorboard, wandb or both")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    method: MethodConfig = section(MethodConfig(), "changes results")
    data: DataConfig = section(DataConfig(), "which images are trained on")
    performance: PerformanceConfig = section(PerformanceConfig(), "changes speed and memory only")
    run: RunConfig = section(RunConfig(), "device, logging, checkpoints, evaluation")

    def __post_init__(self) -> None:
        if self.performance.cuda_graphs:
            self.require_repeated_launches()

    def require_repeated_launches(self) -> None:
        """Raise InputError where the blocks are not launched alike in every step, as graphs are."""
        backbone, reason = self.method.backbone, "with performance.cuda_graphs=true"
        if not isinstance(backbone, ViTConfig):
            raise backbone.wrong("kind", f"vit {reason}")
        rates = {*backbone.drop_rates}
        if len(rates) > 1:
            raise backbone.wrong("drop_path_uniform", f"true {reason}")
        if 0 < min(rates) <= 0.1:
            fixed = "0, or more than 0.1, where the number of crops that are kept is fixed,"
            raise backbone.wrong("drop_path", f"{fixed} {reason}")

    def open(self, openers: Openers | None = None) -> DataSplit:
        """The images; see `DataConfig.open`."""
        return self.data.open(self.method.seed, openers, self.method.backbone.channels)

    RENAMED: ClassVar[dict[str, str]] = {  # old names of options, in configurations of earlier versions
        "method.chunks": "method.micro_batches",
        "performance.reduce": "method.reduce_dtype",
        "run.data": "data.source",
        "run.holdout": "data.holdout",
        "run.init_from": "method.init.weights",
        "run.unreadable_share": "data.unreadable_share",
    }


def with_data(config: Config, source: str) -> Config:
    """The configuration with other images."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))


def with_teacher(config: Config, weights: str | None) -> Config:
    """The configuration with a frozen teacher, if one is named, and with feature distillation from it."""
    if not weights:
        return config
    method = config.method
    loss = dataclasses.replace(method.loss, features=method.loss.features or 1.0)
    teacher = dataclasses.replace(method.teacher, frozen=weights)
    return dataclasses.replace(config, method=dataclasses.replace(method, loss=loss, teacher=teacher))


def with_run(config: Config, **changes: object) -> Config:
    """The configuration with some of its `run` options replaced."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))  # type: ignore[arg-type]
