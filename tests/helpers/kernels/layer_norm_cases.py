"""Inputs and truth of the LayerNorm tests, interpreted and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels import backend, elastic_layer_norm
from helpers.kernels.numerics import assert_all_as_good, draw

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


def assert_accurate(
    tokens: int,
    width: int,
    largest: int,
    kept: int | None,
    with_affine: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    runs: int = 1,
) -> None:
    """Of all rows, or of so many that are kept; in all runs the same bits."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(3))
    rows = None if kept is None else order[:kept].to(device)
    x = draw(tokens, width).to(device, dtype)
    dy = draw(tokens if kept is None else kept, width, seed=4).to(device, dtype)
    low = tuple(p.to(device, dtype) for p in affine(width, largest)) if with_affine else None
    exact = tuple(p.double() for p in low) if low else None
    ours, *again = (run(x, low, rows, dy, "triton") for _ in range(runs))
    truth = run(x.double(), exact, rows, dy.double(), "reference")
    assert_all_as_good(ours, run(x, low, rows, dy, "reference"), truth)
    assert all(result.dtype == dtype for result in ours)
    assert not any(gradient[width:].any() for gradient in ours[2:])
    assert all(torch.equal(a, r) for other in again for a, r in zip(ours, other, strict=True))
