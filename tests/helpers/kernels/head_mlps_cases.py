"""Inputs and truth of the tests of several MLPs on the same rows, interpreted and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels import backend, elastic_head_mlps
from elastic_kernels.linear import Scale
from helpers.kernels.numerics import assert_kernels_accurate, draw

WIDTH = 24
DEPTHS = {3: [(40, 32), (48, 40), (16, 48)], 1: [(33, 32)]}  # layers of an MLP: its shapes


def assert_accurate(rows: int, dtype: torch.dtype, device: str = "cpu", scale: Scale = "offset") -> None:
    """Outputs and gradients of an MLP with biases, of one without, and of single layers."""
    chains = [(DEPTHS[3], True), (DEPTHS[1], True), (DEPTHS[3], False)]
    shapes = [shape for chain, _ in chains for shape in chain]
    tensors = [
        draw(rows, WIDTH),
        *(draw(*shape, seed=i) * shape[1] ** -0.5 for i, shape in enumerate(shapes)),
    ]
    tensors += [draw(n, seed=n) for chain, biased in chains for n, _ in chain if biased]
    tensors = [t.to(device, dtype) for t in tensors]

    def run(name: str, wide: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        weights, biases = iter(leaves[1:]), iter(leaves[1 + len(shapes) :])
        mlps = [
            [(next(weights), next(biases) if biased else None) for _ in chain] for chain, biased in chains
        ]
        with backend(name):
            ys = elastic_head_mlps(leaves[0], mlps, scale=scale)
        dys = [draw(*y.shape[::-1], seed=5).t().to(y) for y in ys]
        return [y.detach() for y in ys] + list(torch.autograd.grad(ys, leaves, dys))

    assert_kernels_accurate(run, dtype)
