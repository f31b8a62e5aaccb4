"""Inputs and truth of the tests of KoLeo, interpreted and on a GPU."""

from __future__ import annotations

import torch

from elastic_kernels import backend, koleo
from helpers.kernels.numerics import assert_kernels_accurate, draw


def assert_accurate(
    shapes: list[tuple[int, int]], groups: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Loss and gradients of matrices, in the first of which several rows have the same neighbour."""
    tensors = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    tensors[0][: len(tensors[0]) // groups : 2] += 3
    tensors = [torch.cat([t, t], 1)[:, : t.shape[1]].to(device, dtype) for t in tensors]

    def run(name: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        with backend(name):
            loss = koleo(*leaves, groups=groups)
            return [loss.detach(), *torch.autograd.grad(0.7 * loss, leaves)]

    assert_kernels_accurate(run, dtype)
