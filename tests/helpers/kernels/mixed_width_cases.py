"""Inputs and truth of products whose rows have widths of their own, interpreted and on a device."""

from __future__ import annotations

import torch
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels import backend
from helpers.kernels.numerics import assert_as_good_as_torch, draw


def run(dtype: torch.dtype, name: str, scale: object, rows: int, device: str) -> list[Tensor]:
    """Output and the gradients of x, weight and bias on a backend; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(rows)
    low = dtype if dtype != torch.float64 else torch.float32
    x, weight, bias = (draw(*s, seed=n) for n, s in enumerate([(rows, 97), (70, 97), (70,)]))
    leaves = [t.to(device, low).to(dtype).requires_grad_() for t in (x, weight / 10, bias)]
    widths = torch.randint(1, 98, (rows,), generator=generator).sort().values.to(device)
    out = torch.randint(1, 71, (rows,), generator=generator).to(device)
    with backend(name):
        y = ek.mixed_width_linear(*leaves, widths, out, scale=scale)
        return [y.detach(), *torch.autograd.grad(y, leaves, draw(rows, 70, seed=9).to(device, low).to(dtype))]


def assert_accurate(dtype: torch.dtype, scale: object, rows: int, device: str = "cpu") -> None:
    results = [run(dtype, name, scale, rows, device) for name in ("triton", "reference")]
    truth = run(torch.float64, "reference", scale, rows, device)
    for label, ours, torchs, exact in zip(("y", "dx", "dweight", "dbias"), *results, truth, strict=True):
        assert ours.dtype == dtype
        assert_as_good_as_torch(ours, torchs, exact, label=label)
