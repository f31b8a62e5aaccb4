"""Position embeddings of a ViT for any grid of patches: learned, and rotary as of DINOv3 and EVA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import Rotary, cached_constant, resized_positions


class RotaryKind(NamedTuple):
    """Which angles turn queries and keys.

    Attributes:
        temperature: ratio of the largest frequency to the smallest, nearly.
        centred: DINOv3's, positions from -1 to 1; otherwise EVA's, which count patches.
        grid: patches along a side that others are scaled to; 0: they are not.
    """

    temperature: float = 100.0
    centred: bool = True
    grid: int = 0

    def positions(self, patches: int) -> Tensor:
        """Of the patches along a side, float32 `[patches]`."""
        if self.centred:
            return 2.0 * (torch.arange(0.5, patches, dtype=torch.float32) / patches) - 1.0
        counted = torch.arange(patches, dtype=torch.float32)
        return counted / patches * self.grid if self.grid else counted


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


def rotary_of_grids(
    x: Tensor, grids: Sequence[tuple[int, int, int]], prefix: int, head_dim: int, kind: RotaryKind
) -> Rotary:
    """Angles of packed tokens: of each group so many images, with height and breadth of their grids.

    Those of `prefix` tokens before the patches are 0. Their device is that of `x`.
    """
    sin, cos = cached_constant(x, _packed_angles, tuple(grids), prefix, head_dim, kind, x.device)
    return Rotary(sin, cos, halves=True)


def angles_of_grid(x: Tensor, height: int, breadth: int, head_dim: int, kind: RotaryKind) -> Tensor:
    """Sines and cosines `[2, height * breadth, head_dim]` of a grid, on the device of `x`."""
    return cached_constant(x, _grid_angles, height, breadth, head_dim, kind, x.device)


@lru_cache
def _grid_angles(height: int, breadth: int, head_dim: int, kind: RotaryKind, device: torch.device) -> Tensor:
    return _angles(height, breadth, head_dim, kind).to(device)


@lru_cache(maxsize=4)  # they are as many as tokens of a batch
def _packed_angles(
    grids: Sequence[tuple[int, int, int]], prefix: int, head_dim: int, kind: RotaryKind, device: torch.device
) -> Tensor:
    """`[2, tokens, head_dim]`."""
    straight = torch.stack([torch.zeros(prefix, head_dim), torch.ones(prefix, head_dim)])
    parts = [
        torch.cat([straight, _angles(height, breadth, head_dim, kind)], dim=1).repeat(1, count, 1)
        for count, height, breadth in grids
    ]
    return torch.cat(parts, dim=1).to(device)


def _angles(height: int, breadth: int, head_dim: int, kind: RotaryKind) -> Tensor:
    """As timm has them: rows turn the first half of the pairs (i, i + d / 2), columns the others."""
    sides = [kind.positions(side) for side in (height, breadth)]
    grid = torch.stack(torch.meshgrid(sides, indexing="ij"), dim=-1).flatten(0, 1)
    exponents = 2.0 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 2)
    turn = 2 * math.pi if kind.centred else 1.0
    angles = (turn * grid.unsqueeze(2) / kind.temperature**exponents).flatten(1)
    return torch.stack([angles.sin(), angles.cos()]).repeat(1, 1, 2)
