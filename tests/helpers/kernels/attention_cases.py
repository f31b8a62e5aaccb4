"""Inputs and truth of the attention tests, interpreted and on a GPU."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from elastic_kernels import backend, packed_attention
from helpers.kernels.numerics import assert_as_good_as_torch, draw

Groups = list[tuple[int, int]]
PARTIAL_DIMS = (1, 5, 8, 24, 48, 72, 80, 96, 112)  # of heads that do not fill their tile


def active_heads(groups: Groups, dim: int, heads: int = 2) -> Tensor:
    """The first heads of a wider float64 tensor whose other heads are NaN: they must never be read."""
    tokens = sum(count * length for count, length in groups)
    full = torch.full((tokens, 3, heads + 1, dim), torch.nan, dtype=torch.float64)
    full[:, :, :heads] = draw(tokens, 3, heads, dim)
    return full


def offsets_of(groups: Groups) -> Tensor:
    """Where each sequence begins, and the last one ends."""
    lengths = [length for count, length in groups for _ in range(count)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def assert_accurate(
    case: Groups, dim: int, dtype: torch.dtype, name: str, device: str = "cpu", by_offsets: bool = False
) -> None:
    """A backend's output and gradient are as good as the reference's in the same dtype."""
    exact = active_heads(case, dim).to(dtype).double()[:, :, :2]
    qkv = active_heads(case, dim).to(dtype).to(device)[:, :, :2]
    dout = draw(qkv.shape[0], 2 * dim, seed=1).to(dtype)
    truth = run(exact, case, dout.double(), "reference")
    ours = run(qkv, offsets_of(case).to(device) if by_offsets else case, dout.to(device), name)
    torchs = run(qkv, case, dout.to(device), "reference")
    for a, b, t in zip(ours, torchs, truth, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_torch(a.cpu(), b.cpu(), t)


def run(qkv: Tensor, groups: Groups | Tensor, dout: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Output and gradient on a backend."""
    leaf = qkv.detach().requires_grad_()
    with backend(name):
        out = packed_attention(leaf, groups)
        (grad,) = torch.autograd.grad(out, leaf, dout)
    return out.detach(), grad
