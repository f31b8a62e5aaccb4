"""Inputs, truth and error rule of the attention tests, interpreted and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels import backend, packed_attention

Groups = list[tuple[int, int]]

STORAGE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # rounding of a result near 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


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


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """Our error is at most twice that of PyTorch in the same dtype, plus rounding of the result."""
    assert ours.shape == truth.shape
    if not truth.numel():
        return
    error = (ours.double() - truth).abs().nan_to_num(torch.inf)
    rounding = STORAGE[ours.dtype] * max(float(truth.abs().max()), 1.0)
    limit = 2 * float((torchs.double() - truth).abs().max()) + rounding
    worst = int(error.argmax())
    assert float(error.max()) <= limit, (
        f"worst element {worst}: {ours.flatten()[worst]} against {truth.flatten()[worst]}, limit {limit}"
    )
