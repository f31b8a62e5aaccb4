"""Inputs and truth of the LayerNorm tests, interpreted and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels import backend, elastic_layer_norm
from helpers.kernels.numerics import draw

EPS = 1e-6


def affine(width: int, largest: int) -> tuple[Tensor, Tensor]:
    """Float64 weight and bias that are NaN outside of the active width: it must never be read."""
    weight, bias = (torch.full((largest,), torch.nan, dtype=torch.float64) for _ in range(2))
    weight[:width], bias[:width] = 1 + 0.3 * draw(width, seed=1), draw(width, seed=2)
    return weight, bias


def run(
    x: Tensor, parameters: tuple[Tensor, Tensor] | None, rows: Tensor | None, dy: Tensor, name: str
) -> list[Tensor]:
    """Output and gradients of x (, weight, bias) on a backend."""
    leaves = [t.detach().requires_grad_() for t in (x, *(parameters or ()))]
    weight, bias = leaves[1:] or (None, None)
    with backend(name):
        y = elastic_layer_norm(leaves[0], weight, bias, EPS, rows=rows)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
