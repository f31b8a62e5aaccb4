"""Images of noise, and parameters of crops that change nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from elastic_kernels import NEUTRAL_CROP, CropParameters

# Pixels come out as levels 0..255, and nothing but the crop happens.
LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def neutral(boxes: list[tuple[int, int, int, int]], **changes: Tensor) -> CropParameters:
    """Parameters that only cut and resize, but for `changes`."""
    count, off = len(boxes), torch.zeros(len(boxes), dtype=torch.bool)
    views = CropParameters(
        boxes=torch.tensor(boxes).view(-1, 4),
        flip=off,
        jitter=off,
        factors=torch.tensor([NEUTRAL_CROP]).repeat(count, 1),
        order=torch.arange(4).repeat(count, 1),
        grayscale=off,
        sigma=torch.zeros(count),
        solarize=off,
    )
    return dataclasses.replace(views, **changes)
