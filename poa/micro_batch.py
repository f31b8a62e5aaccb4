"""A micro-batch on the training device: augmented crops, masks, and what each student sees of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poa.config import MethodConfig, Precision
from poa.data.augment import augment
from poa.masks import Masks, draw_masks
from poa.network import VIEWS, Batch, Network, StudentPass
from poa.random import python_stream, torch_stream
from poa.subnets import Subnet

AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MicroBatch:
    """What a forward and backward take: images, and the students that see them (intact, elastic)."""

    batch: Batch
    passes: Sequence[StudentPass]


@dataclass(frozen=True)
class Draws:
    """The random streams of a micro-batch, each used once."""

    augmentation: torch.Generator
    masks: random.Random
    stochastic_depth: tuple[torch.Generator, torch.Generator]

    @classmethod
    def of(cls, seed: int, step: int, number: int) -> Draws:
        """Those of the micro-batch `number` of a step."""
        depth = [torch_stream(seed, "stochastic depth", step, number, student) for student in range(2)]
        return cls(
            torch_stream(seed, "augment", step, number),
            python_stream(seed, "masks", step, number),
            (depth[0], depth[1]),
        )


def make_micro_batch(
    method: MethodConfig,
    student: Network,
    canvases: Tensor,
    sizes: Tensor,
    elastic: Subnet,
    draws: Draws,
    *,
    masked: bool,
) -> MicroBatch:
    """Augment decoded images on their device, and draw the masks, if iBOT has started, and the stochastic
    depth.

    Canvases are uint8 `[B, C, canvas, canvas]`, sizes int64 `[B, 2]` on the CPU: height and width in pixels
    of the image on each. The passes are for `student`.
    """
    dtype = AUTOCAST.get(method.precision, torch.float32)
    global_crops, local_crops = augment(canvases, sizes, method.crops, draws.augmentation, dtype)
    masks = crop_masks(method, len(canvases), draws.masks if masked else None)
    batch = Batch(global_crops, local_crops, masks.to(canvases.device))
    subnets = (method.backbone.space.intact, elastic)
    return MicroBatch(batch, student_passes(student, batch, subnets, draws.stochastic_depth))


def crop_masks(method: MethodConfig, images: int, dice: random.Random | None) -> Masks:
    """Masks of the global crops of so many images; without dice, of no patch."""
    side, crops = method.backbone.grid(method.crops.global_size), VIEWS * images
    if dice is None:
        return Masks.none(crops, side * side)
    return draw_masks(crops, (side, side), method.masks.probability, method.masks.ratio, dice)


def student_passes(
    student: Network, batch: Batch, subnets: Sequence[Subnet], draws: Sequence[torch.Generator]
) -> list[StudentPass]:
    """Passes of these subnets over a batch, each with the stochastic depth that its CPU generator draws."""
    passes = []
    for subnet, draw in zip(subnets, draws, strict=True):
        drop = student.backbone.draw_stochastic_depth(batch.crops, subnet, draw)
        passes.append(StudentPass(subnet, drop.to(batch.global_crops.device) if drop else None))
    return passes
