"""Inputs and truth of the attention tests, interpreted and on a GPU."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from elastic_kernels import backend, packed_attention
from helpers.kernels.numerics import assert_all_as_good, draw

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
    heads: int = 2,
    device: str = "cpu",
    runs: int = 1,
) -> None:
    """A backend's output and gradient are as good as the reference's in the same dtype; runs agree."""
    qkv, active = active_heads(case, dim, heads).to(device, dtype)[:, :, :heads], None
    if absent:
        qkv, active = without_absent_heads(qkv, case)
    dout = draw(qkv.shape[0], heads * dim, seed=1).to(device, dtype)
    layout = offsets_of(case).to(device) if by_offsets else case
    ours, *again = (run(qkv, layout, dout, name, active) for _ in range(runs))
    truth = run(qkv.double(), case, dout.double(), "reference", active)
    assert_all_as_good(ours, run(qkv, case, dout, "reference", active), truth)
    assert all(torch.equal(a, r) for other in again for a, r in zip(ours, other, strict=True))


def run(
    qkv: Tensor, groups: Groups | Tensor, dout: Tensor, name: str, heads: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and gradient on a backend."""
    leaf = qkv.detach().requires_grad_()
    with backend(name):
        out = packed_attention(leaf, groups, heads)
        (grad,) = torch.autograd.grad(out, leaf, dout)
    return out.detach(), grad
