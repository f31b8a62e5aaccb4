"""Inputs and truth of the LayerNorm tests, interpreted and on a GPU."""

from __future__ import annotations

import torch
from numerics import assert_as_good_as_torch, draw
from torch import Tensor

from elastic_kernels import backend, elastic_add_layer_norm, elastic_layer_norm

EPS = 1e-6


def affine(width: int, largest: int) -> tuple[Tensor, Tensor]:
    """Float64 weight and bias that are NaN outside of the active width: it must never be read."""
    weight, bias = (torch.full((largest,), torch.nan, dtype=torch.float64) for _ in range(2))
    weight[:width], bias[:width] = 1 + 0.3 * draw(width, seed=1), draw(width, seed=2)
    return weight, bias


def run(
    x: Tensor,
    parameters: tuple[Tensor, Tensor] | None,
    rows: Tensor | None,
    dy: Tensor,
    name: str,
) -> list[Tensor]:
    """Output and gradients of x (, weight, bias) on a backend."""
    leaves = [t.detach().requires_grad_() for t in (x, *(parameters or ()))]
    weight, bias = leaves[1:] or (None, None)
    with backend(name):
        y = elastic_layer_norm(leaves[0], weight, bias, EPS, rows=rows)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_accurate_sum(
    tokens: int, width: int, largest: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Of x + residual: both results and every gradient."""
    inputs = [draw(tokens, width, seed=n).to(device, dtype) for n in range(4)]  # x, residual, dy, dsum
    low = tuple(p.to(device, dtype) for p in affine(width, largest))

    def results(name: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (*inputs[:2], *low)]
        with backend(name):
            outputs = elastic_add_layer_norm(*leaves, EPS)
            grads = torch.autograd.grad(outputs, leaves, [t.to(kind) for t in inputs[2:]])
        return [t.detach() for t in (*outputs, *grads)]

    truth = results("reference", torch.float64)
    for ours, torchs, exact in zip(results("triton", dtype), results("reference", dtype), truth, strict=True):
        assert ours.dtype == dtype
        assert_as_good_as_torch(ours, torchs, exact)
