"""Inputs and truth of RMSNorm, interpreted and on a device."""

from __future__ import annotations

import torch
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels import backend
from helpers.kernels.numerics import assert_as_good_as_torch, draw


def run(sizes: tuple[int, int], gather: bool, dtype: torch.dtype, name: str, device: str) -> list[Tensor]:
    """Output and the gradients of x and the weight, which is NaN beyond the width."""
    rows, width = sizes
    low = dtype if dtype != torch.float64 else torch.float32
    weight = torch.cat([draw(width, seed=1), torch.full((5,), torch.nan, dtype=torch.float64)])
    x, weight = (t.to(device, low).to(dtype).requires_grad_() for t in (draw(rows, width), weight))
    index = torch.arange(rows - 1, -1, -2, device=device) if gather else None
    with backend(name):
        y = ek.elastic_rms_norm(x, weight, 1e-3, rows=index)
        dy = draw(*y.shape, seed=9).to(device, low).to(dtype)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert not dweight[width:].any()
    return [y.detach(), dx, dweight]


def assert_accurate(sizes: tuple[int, int], gather: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    ours, torchs = (run(sizes, gather, dtype, name, device) for name in ("triton", "reference"))
    truth = run(sizes, gather, torch.float64, "reference", device)
    for label, a, b, t in zip(("y", "dx", "dweight"), ours, torchs, truth, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b, t, label=label)
