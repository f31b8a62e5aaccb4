"""Inputs and truth of RMSNorm, interpreted and on a device."""

from __future__ import annotations

import torch
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels import backend
from helpers.kernels.numerics import assert_kernels_accurate, draw


def assert_accurate(sizes: tuple[int, int], gather: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    """Output and the gradients of x and the weight, which is NaN beyond the width."""
    rows, width = sizes
    weight = torch.cat([draw(width, seed=1), torch.full((5,), torch.nan, dtype=torch.float64)])
    tensors = [t.to(device, dtype) for t in (draw(rows, width), weight)]
    index = torch.arange(rows - 1, -1, -2, device=device) if gather else None

    def run(name: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in tensors]
        with backend(name):
            y = ek.elastic_rms_norm(*leaves, 1e-3, rows=index)
            dy = draw(*y.shape, seed=9).to(device, dtype).to(kind)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert not assert_kernels_accurate(run, dtype)[2][width:].any()
