"""The configuration of a run.

`method` and `data` are what changes results; `performance` must not change them; `run` says what happens
around the training, and neither results nor speed depend on it, but for `run.init_from`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from poa.backbones import BackboneOptions, ViTConfig
from poa.data.crops import CropsConfig
from poa.data.sources import DataConfig
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
class MethodConfig(Options, at="method"):
    """Everything that changes results."""

    seed: int = option(0, "seed of every random choice", "[0, 4294967295]")
    batch_size: int = option(64, "images of a micro-batch, which a rank takes at once", f"[1, {MOST_IMAGES}]")
    micro_batches: int | None = option(
        None,
        "micro-batches of a step over all ranks; with fewer ranks each accumulates the gradients of several; "
        "none: one a rank",
        "[1, 65536]",
    )
    reduce_dtype: Literal["fp32", "bf16"] = option(
        "fp32", "dtype in which gradients travel between ranks; bf16 rounds them"
    )
    precision: Precision = option("bf16", "dtype of the matrix products; weights and loss are fp32")
    sampling: Literal["per-rank", "shared", "balanced"] = option(
        "per-rank", "elastic subnet of each micro-batch: its own, one for all, or of about equal cost"
    )
    shuffle_block: int = option(
        1,
        "neighbouring images that stay near to each other when shuffled, for storage that is slow at random",
        "[1, 1e9]",
    )
    canvas: int = option(
        256, "images are shrunk to fit a square of this many pixels when decoded", "[8, 16384]"
    )
    backbone: BackboneOptions = section(ViTConfig(), "the elastic network")
    head: HeadConfig = section(HeadConfig(), "the projection heads")
    loss: LossConfig = section(LossConfig(), "the loss")
    crops: CropsConfig = section(CropsConfig(), "crops and augmentation")
    masks: MaskConfig = section(MaskConfig(), "masks of patches")
    optim: OptimConfig = section(OptimConfig(), "optimiser, schedules and teacher")

    def check(self) -> None:
        if self.crops.global_size != self.backbone.image_size:
            raise self.crops.wrong("global_size", f"method.backbone.image_size {self.backbone.image_size}")
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
        4, "processes that decode images, at most one a CPU; 0: in the training process", "[0, 1024]"
    )
    recompute: bool = option(False, "recompute blocks in backward: less memory, more time")
    backward: Literal["together", "apart"] = option(
        "together",
        "of both students at once, or of the intact one before the elastic one runs: less memory",
    )
    deterministic: bool = option(False, "only algorithms whose results repeat bitwise")
    optimizer: OptimizerKind = option(
        "fused",
        "AdamW in one pass with clipping and the teacher's average, or PyTorch's, or apex's FusedAdam",
    )
    threads: int | None = option(
        None,
        "CPU threads of PyTorch, also in evaluate and extract; none: OMP_NUM_THREADS, and where that is not "
        "set one if the run is on a CPU; workers take one each",
        "[1, 1024]",
    )


@dataclass(frozen=True)
class RunConfig(Options, at="run"):
    """What happens around the training."""

    init_from: str = option("", "run folder whose newest weights the run starts from; empty: random weights")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    log_every: int = option(20, "steps between lines of metrics.jsonl and of the progress", "[1, 1e9]")
    save_every: int = option(1000, "steps between checkpoints; the last step is always saved", "[1, 1e9]")
    keep_last: int = option(2, "number of newest checkpoints that are kept", "[1, 1e6]")
    keep_every: int = option(
        0, "checkpoints of every so many steps are kept for good; 0: of none", "[0, 1e9]"
    )
    evaluate_every: int = option(1000, "steps between k-NN evaluations; 0: never", "[0, 1e9]")
    knn_images: int = option(
        10000, "at most this many bank and query images in k-NN during training", "[1, 1e9]"
    )
    knn_subnets: tuple[str, ...] = option(
        (), "subnets of the teacher for them, such as 384x12,192x6; none: the intact one and the smallest"
    )
    skip_limit: int = option(
        30, "a run stops after so many skipped steps (NaN or inf gradients) in a row", "[1, 1e9]"
    )
    timeout: float = option(
        600.0, "seconds to wait for another process before contact with it counts as lost", "[1, 1e6]"
    )
    log_to: tuple[Destination, ...] = option((), "tensorboard, wandb or both, besides metrics.jsonl")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    method: MethodConfig = section(MethodConfig(), "changes results")
    data: DataConfig = section(DataConfig(), "which images are trained on")
    performance: PerformanceConfig = section(PerformanceConfig(), "changes speed and memory only")
    run: RunConfig = section(RunConfig(), "device, logging, checkpoints, evaluation")

    RENAMED: ClassVar[dict[str, str]] = {  # what options were called in runs of before
        "method.chunks": "method.micro_batches",
        "performance.reduce": "method.reduce_dtype",
        "run.data": "data.source",
        "run.holdout": "data.holdout",
        "run.unreadable_share": "data.unreadable_share",
    }


def with_data(config: Config, source: str) -> Config:
    """The configuration with other images."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))


def with_run(config: Config, **changes: object) -> Config:
    """The configuration with some of its `run` options replaced."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))  # type: ignore[arg-type]
