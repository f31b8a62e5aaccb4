"""Position embeddings of a ViT for any grid of patches."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import cached_constant, resized_positions


def positions_of_grid(positions: Tensor, prefix: int, height: int, breadth: int) -> Tensor:
    """The position embedding `[1, prefix + height * breadth, width]` of a grid of patches.

    It is made of the trained one, `[1, prefix + side * side, width]`, with `prefix` tokens before the
    patches.
    """
    return resized_positions(positions, prefix, resizing_of_grid(positions, prefix, height, breadth))


def resizing_of_grid(positions: Tensor, prefix: int, height: int, breadth: int) -> Tensor | None:
    """The matrix that makes the positions of a grid: bicubic interpolation; None for the trained grid.

    The scale factors carry the official + 0.1, which changes the sampled positions; passing the size instead
    would not match.
    """
    side = math.isqrt(positions.shape[1] - prefix)
    if (height, breadth) == (side, side):
        return None
    return cached_constant(positions, _interpolation, side, height, breadth, positions.device)


@lru_cache
def _interpolation(side: int, height: int, breadth: int, device: torch.device) -> Tensor:
    """The matrix `[height * breadth, side * side]` of a bicubic interpolation of positions, float64.

    Its product has the same gradient bits every time, which PyTorch's bicubic interpolation lacks on a GPU.
    """
    grid = torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)
    factors = ((height + 0.1) / side, (breadth + 0.1) / side)
    resized = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    assert resized.shape[-2:] == (height, breadth)
    return resized.flatten(1).t().contiguous().to(device)
