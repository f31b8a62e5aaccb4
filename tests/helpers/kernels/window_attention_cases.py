"""Inputs and truth of the window-attention tests, interpreted and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels import backend, window_attention
from helpers.kernels.numerics import assert_all_as_good, draw

Maps = list[tuple[int, int, int]]


def inputs(maps: Maps, window: int, heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 qkv, bias and pad; what belongs to heads that are not in use is NaN: it must never be read."""
    tokens, n = sum(count * height * width for count, height, width in maps), window**2
    qkv = torch.full((tokens, 3, heads + 1, dim), torch.nan, dtype=torch.float64)
    qkv[:, :, :heads] = draw(tokens, 3, heads, dim)
    bias, pad = draw(heads + 1, n, n, seed=1), draw(3, heads + 1, dim, seed=2)
    bias[heads], pad[:, heads] = torch.nan, torch.nan
    return qkv[:, :, :heads], bias, pad


def run(
    leaves: tuple[Tensor, Tensor, Tensor], maps: Maps, window: int, shift: int, dout: Tensor, name: str
) -> list[Tensor]:
    """Output and gradients of qkv, bias and pad on a backend."""
    qkv, bias, pad = (t.detach().requires_grad_() for t in leaves)
    with backend(name):
        out = window_attention(qkv, bias, pad, maps, window=window, shift=shift)
        gradients = torch.autograd.grad(out, (qkv, bias, pad), dout, materialize_grads=True)
        return [out.detach(), *gradients]


def assert_accurate(
    maps: Maps, window: int, shift: int, dtype: torch.dtype, dim: int = 16, device: str = "cpu"
) -> None:
    """Kernels are as good as the definition in the same dtype."""
    qkv, bias, pad = inputs(maps, window, dim=dim)
    low = (qkv.to(dtype), bias.float(), pad.to(dtype))
    exact = tuple(t.double() for t in low)
    dout = draw(len(qkv), 2 * dim, seed=3).to(dtype)
    truth = run(exact, maps, window, shift, dout.double(), "reference")
    on = tuple(t.to(device) for t in low)
    ours, torchs = (run(on, maps, window, shift, dout.to(device), name) for name in ("triton", "reference"))
    assert_all_as_good(*([t.cpu() for t in results] for results in (ours, torchs)), truth)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, dtype]
    assert not ours[2][2].any() and not ours[3][:, 2].any() and not ours[3][0].any()
