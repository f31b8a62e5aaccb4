"""Inputs and truth of the tests of unit rows, interpreted and on a GPU."""

from __future__ import annotations

import torch

from elastic_kernels import backend, unit_rows
from helpers.kernels.numerics import assert_all_as_good, draw


def assert_accurate(rows: int, width: int, gain: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    """Output and gradients in fp32 of rows in a dtype, one of zeros among them if they have no gain."""
    tensors = [draw(rows, width), *([1 + draw(rows, 1, seed=1)] if gain else [])]
    if not gain:
        tensors[0][-1:] = 0
    tensors = [tensor.to(device, dtype) for tensor in tensors]

    def run(name: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype if wide == torch.float32 else wide).requires_grad_() for t in tensors]
        with backend(name):
            y = unit_rows(*leaves, dtype=wide)
            dy = draw(width + 3, rows, seed=2)[3:].t().to(y)  # of no unit stride
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    truth = run("reference", torch.float64)
    torchs, ours = (run(name, torch.float32) for name in ("reference", "triton"))
    if not gain:  # gradients of a row of zeros are those of the smallest norm, 1e12 times the others
        truth, torchs, ours = ([y, dx[:-1]] for y, dx in (truth, torchs, ours))
    assert all(value.isfinite().all() for value in ours)
    assert_all_as_good(ours, torchs, truth)
