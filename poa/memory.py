"""What a step will need of a GPU's memory, found without one.

The step runs on meta tensors, which have shapes and no data, through the operators that a GPU would take;
what lives at the same time is added up.
"""

from __future__ import annotations

import dataclasses
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_kernels import planning
from poa.config import MOST_IMAGES, Config
from poa.errors import InputError
from poa.flops import expected_masked
from poa.initialization import frozen_teacher
from poa.masks import Masks
from poa.micro_batch import AUTOCAST, MicroBatch, student_passes
from poa.network import VIEWS, Batch, Network
from poa.optim import build_optimizer
from poa.options import override
from poa.presets import preset
from poa.random import torch_stream
from poa.step import TrainingState, accumulate_gradients, rounded_weights
from poa.subnets import Subnet
from poa.tribranch import Centers, teacher_targets

BLOCK = 512  # bytes, in multiples of which PyTorch's allocator for CUDA hands out memory
MOMENTS, BUCKETS = 8, 4  # bytes a parameter of AdamW's state, and of DDP's buffers
# CUDA itself, libraries and their workspaces, and what the allocator cannot use. Not measured yet: a choice.
RESERVE = 2 * 2**30
GPUS = {24: "RTX 4090", 40: "A100", 80: "A100, H100", 141: "H200"}  # GB that are sold, and on which cards


@dataclass(frozen=True)
class Prediction:
    """Bytes of a step.

    Attributes:
        images: of a micro-batch.
        fixed: weights of both networks, their working copies and AdamW's moments.
        peak: the most that lives at the same time, all of it, without `RESERVE` and `buckets`.
        buckets: what DDP adds where there are several GPUs.
    """

    images: int
    fixed: int
    peak: int
    buckets: int

    def fits(self, gigabytes: float) -> bool:
        """Whether the step runs on a GPU, also beside others."""
        return self.peak + self.buckets + RESERVE <= gigabytes * 1e9


@cache
def predict_memory(config: Config, images: int | None = None, elastic: Subnet | None = None) -> Prediction:
    """The memory of a step on one GPU, by default of the configuration's micro-batch with the intact network
    as the elastic student, which is the most.

    Raises:
        InputError: an optimiser other than the fused one, whose state is not known here.
    """
    if config.performance.optimizer == "apex":
        raise InputError("performance.optimizer: expected fused or torch for a prediction, got apex")
    method = dataclasses.replace(config.method, batch_size=images or config.method.batch_size)
    config = dataclasses.replace(config, method=method)
    with Living() as living:
        state = planned_state(config)
        parameters = sum(p.numel() for p in state.student.parameters())
        moments = MOMENTS * parameters
        fixed = living.now + moments
        planned_gradients(config, state, elastic or method.backbone.space.intact)
    return Prediction(method.batch_size, fixed, living.peak + moments, BUCKETS * parameters)


class Living(TorchDispatchMode):
    """Adds up the bytes of the meta tensors that exist: `now`, and the most so far, `peak`.

    What an operator allocates and frees inside of itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._add(tensor.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def planned_state(config: Config) -> TrainingState:
    """Weights and optimiser on meta tensors."""
    method = config.method
    with torch.device("meta"):
        student, teacher = (Network(method.backbone, method.head) for _ in range(2))
    teacher.requires_grad_(False)
    with planning(AUTOCAST.get(method.precision, torch.float32)):
        optimizer = build_optimizer(student, teacher, method.optim, config.performance.optimizer)
        rounded = rounded_weights(student, teacher, method.precision)
    centers = Centers.zeros(method.head.prototypes, torch.device("meta"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    frozen = frozen_teacher(method)
    return TrainingState(
        student, teacher, optimizer, centers, scaler, rounded, frozen.to("meta") if frozen else None
    )


def planned_gradients(config: Config, state: TrainingState, elastic: Subnet) -> None:
    """Forward passes and backward of a micro-batch without data, with the average number of masks."""
    method = config.method
    micro_batch = _micro_batch(config, state, elastic)
    with planning(AUTOCAST.get(method.precision, torch.float32)), state.rounded:
        (targets,) = teacher_targets(
            state.teacher, [micro_batch.batch], 0.07, method.loss, state.centers, state.frozen
        )
        accumulate_gradients(state.student, state, config, micro_batch, targets, 1.0)


def plan_steps(config: Config) -> None:
    """Steps without data with an elastic student of every width: they call what a run calls.

    Kernels know widths and not depths, so the shallowest subnets stand for all.
    """
    state, space = planned_state(config), config.method.backbone.space
    for width in space.widths:
        planned_gradients(config, state, Subnet(width, space.smallest.depth))


def plan_preset(name: str, images: int | None = None) -> None:
    """`plan_steps` of a preset, with its own micro-batch or one of so many images."""
    plan_steps(override(preset(name), [] if images is None else [f"method.batch_size={images}"]))


def _micro_batch(config: Config, state: TrainingState, elastic: Subnet) -> MicroBatch:
    method, meta = config.method, torch.device("meta")
    crops, images = method.crops, method.batch_size
    shapes = [(VIEWS * images, crops.global_size), (crops.local_count * images, crops.local_size)]
    whole, local = (
        torch.empty(count, method.backbone.channels, side, side, device=meta) for count, side in shapes
    )
    patches, masked = method.backbone.grid(crops.global_size) ** 2, round(expected_masked(method))
    masks = Masks(
        torch.empty(VIEWS * images, patches, dtype=torch.bool, device=meta),
        torch.empty(masked, dtype=torch.int64, device=meta),
        torch.empty(masked, device=meta),
    )
    batch = Batch(whole, local, masks)
    draws = [torch_stream(0, "memory")] * 2
    return MicroBatch(
        batch, student_passes(state.student, batch, (method.backbone.space.intact, elastic), draws)
    )


def memory_report(config: Config) -> Iterator[str]:
    """Lines about the configuration's step, and the largest micro-batches that fit on GPUs."""
    space = config.method.backbone.space
    asked = predict_memory(config, config.method.batch_size)
    yield (
        f"{asked.images} images per GPU: peak {_gb(asked.peak)} with the largest elastic student, "
        f"{_gb(predict_memory(config, asked.images, space.smallest).peak)} with the smallest, of which "
        f"{_gb(asked.fixed)} are weights and optimizer state"
    )
    yield f"plus {_gb(RESERVE)} for CUDA and {_gb(asked.buckets)} for DDP's buckets; predicted, not measured"
    if config.performance.cuda_graphs:
        yield "not predicted: performance.cuda_graphs, two graphs for each subnet and their memory"
    for gigabytes, cards in GPUS.items():
        images = largest_batch_size(config, gigabytes)
        yield f"{gigabytes:>5} GB ({cards}): " + (f"up to {images} images" if images else "too small")


def largest_batch_size(config: Config, gigabytes: float, step: int = 8) -> int:
    """The most images, a multiple of `step`, whose step fits on a GPU; 0 for none.

    Memory grows linearly with images, but for rounding and for similarities between them: two predictions
    give a line, another confirms it, or it is searched below.
    """

    def fits(count: int) -> bool:
        return predict_memory(config, count * step).fits(gigabytes)

    few, many = (predict_memory(config, images) for images in (step, 8 * step))
    slope = (many.peak - few.peak) / (7 * step)
    room = gigabytes * 1e9 - RESERVE - few.buckets - few.peak
    most = min(max(round(room / slope / step + 1), 0), MOST_IMAGES // step)
    for count in (most, most - 1):
        if count <= 0 or fits(count):
            return max(count, 0) * step
    return bisect_left(range(1, most), True, key=lambda count: not fits(count)) * step


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
