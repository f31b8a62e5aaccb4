"""Inputs and truth of the group-norm tests, interpreted and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels import backend, elastic_group_norm
from helpers.kernels.layer_norm_cases import affine
from helpers.kernels.numerics import assert_all_as_good, draw

EPS = 1e-5
FUSIONS = [(None, False), ("relu", False), ("relu", True), (None, True)]
FUSION_NAMES = ["plain", "relu", "residual-relu", "residual"]


def run(
    x: Tensor,
    parameters: tuple[Tensor, Tensor],
    groups: int,
    residual: Tensor | None,
    activation: str | None,
    dy: Tensor,
    name: str,
) -> list[Tensor]:
    """Output and gradients of x, weight, bias (, residual) on a backend."""
    leaves = [
        t.detach().requires_grad_() for t in (x, *parameters, *([] if residual is None else [residual]))
    ]
    added = leaves[3] if residual is not None else None
    with backend(name):
        y = elastic_group_norm(*leaves[:3], groups, EPS, residual=added, activation=activation)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_accurate(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    activation: str | None,
    added: bool,
    device: str = "cpu",
    offset: float = 3.0,
) -> None:
    """Kernels are as good as the definition in the same dtype; the mean is `offset` times the deviation."""
    largest = 2 * shape[-1] + 1
    x, dy = (draw(*shape) + offset).to(dtype), draw(*shape, seed=4).to(dtype)
    residual = draw(*shape, seed=5).to(dtype) if added else None
    parameters = tuple(p.float() for p in affine(shape[-1], largest))
    exact = tuple(p.double() for p in parameters)
    residual64 = None if residual is None else residual.double()
    if activation:  # values near the kink may fall on either side of it
        probe = run(x.double(), exact, groups, residual64, None, dy.double(), "reference")[0]
        dy = torch.where(probe.abs() < 0.05, 0.0, dy.double()).to(dtype)
    truth = run(x.double(), exact, groups, residual64, activation, dy.double(), "reference")
    moved = None if residual is None else residual.to(device)
    on = tuple(p.to(device) for p in parameters)
    ours, torchs = (
        run(x.to(device), on, groups, moved, activation, dy.to(device), name)
        for name in ("triton", "reference")
    )
    assert_all_as_good(*([t.cpu() for t in results] for results in (ours, torchs)), truth)
    assert [t.dtype for t in ours[:4]] == [dtype, dtype, torch.float32, torch.float32]
    for gradient in ours[2:4]:
        assert not gradient[shape[-1] :].any()
