"""Inputs and truth of the attention tests, interpreted and on a GPU."""

from __future__ import annotations

import torch
from numerics import draw
from torch import Tensor

from elastic_kernels import backend, packed_attention

Groups = list[tuple[int, int]]


def active_heads(groups: Groups, dim: int, heads: int = 2) -> Tensor:
    """The first heads of a wider float64 tensor whose other heads are NaN: they must never be read."""
    tokens = sum(count * length for count, length in groups)
    full = torch.full((tokens, 3, heads + 1, dim), torch.nan, dtype=torch.float64)
    full[:, :, :heads] = draw(tokens, 3, heads, dim)
    return full


def run(qkv: Tensor, groups: Groups, dout: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Output and gradient on a backend."""
    leaf = qkv.detach().requires_grad_()
    with backend(name):
        out = packed_attention(leaf, groups)
        (grad,) = torch.autograd.grad(out, leaf, dout)
    return out.detach(), grad
