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


def without_absent_heads(qkv: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Sequences have no head, one, two, none, ...: those of each row, and NaN in all others."""
    lengths = torch.tensor([length for count, length in groups for _ in range(count)])
    heads = (torch.arange(len(lengths)) % 3).repeat_interleave(lengths).to(qkv.device)
    absent = torch.arange(qkv.shape[2], device=qkv.device) >= heads.unsqueeze(1)
    return qkv.masked_fill(absent[:, None, :, None], torch.nan), heads


def assert_accurate(
    case: Groups,
    dim: int,
    dtype: torch.dtype,
    name: str,
    *,
    by_offsets: bool = False,
    absent: bool = False,
) -> None:
    """A backend's output and gradient are as good as the reference's in the same dtype."""
    qkv, heads = active_heads(case, dim).to(dtype)[:, :, :2], None
    if absent:
        qkv, heads = without_absent_heads(qkv, case)
    dout = draw(qkv.shape[0], 2 * dim, seed=1).to(dtype)
    truth = run(qkv.double(), case, dout.double(), "reference", heads)
    ours = run(qkv, offsets_of(case) if by_offsets else case, dout, name, heads)
    torchs = run(qkv, case, dout, "reference", heads)
    for a, b, t in zip(ours, torchs, truth, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b, t)


def run(
    qkv: Tensor, groups: Groups | Tensor, dout: Tensor, name: str, heads: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and gradient on a backend."""
    leaf = qkv.detach().requires_grad_()
    with backend(name):
        out = packed_attention(leaf, groups, heads)
        (grad,) = torch.autograd.grad(out, leaf, dout)
    return out.detach(), grad
