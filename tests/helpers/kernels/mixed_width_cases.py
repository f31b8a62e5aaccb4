"""Inputs and truth of rows that have widths of their own, interpreted and on a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels import backend
from elastic_kernels.mixed_width import mixed_width_stacked
from helpers.kernels.numerics import assert_kernels_accurate, draw

IN, OUT = 97, 70
Case = tuple[str, dict[str, Any], int]  # form, options, rows

LINEARS: list[Case] = [
    ("linear", {"scale": "offset", "activation": "gelu"}, 67),
    ("linear", {"scale": None}, 1),
    ("linear", {"scale": 0.5, "activation": "silu"}, 0),
    ("stacked", {"scale": 0.5}, 67),
]
NORMS: list[Case] = [(form, {}, rows) for form in ("layer_norm", "rms_norm") for rows in (67, 1, 0)]


def form_of(
    name: str, widths: Tensor, out: Tensor, options: dict[str, Any]
) -> tuple[Callable[..., Tensor], list]:
    """An operator on x and parameters, and the shapes of these."""
    if name == "linear":
        return partial(ek.mixed_width_linear, widths=widths, out_widths=out, **options), [(OUT, IN), (OUT,)]
    if name == "stacked":
        rest = {"widths": widths, "out_widths": out, "groups": 2, **options}
        return partial(mixed_width_stacked, "test", **rest), [(2 * OUT, IN), (2 * OUT,)]
    if name == "rms_norm":
        return partial(ek.mixed_width_rms_norm, eps=0.1, widths=widths), [(IN,)]
    return partial(ek.mixed_width_layer_norm, eps=0.1, widths=widths), [(IN,), (IN,)]


def assert_accurate(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Output and gradients are as good as the reference's; x is NaN beyond the widths."""
    name, options, rows = case
    generator = torch.Generator().manual_seed(rows)
    widths = torch.randint(1, IN + 1, (rows,), generator=generator).sort().values
    out = torch.randint(1, OUT + 1, (rows,), generator=generator)
    operator, shapes = form_of(name, widths.to(device), out.to(device), options)
    x = draw(rows, IN).masked_fill(torch.arange(IN) >= widths.unsqueeze(1), torch.nan)
    tensors = [x, *(draw(*shape, seed=1 + n) / shape[-1] ** 0.5 for n, shape in enumerate(shapes))]
    tensors = [tensor.to(device, dtype) for tensor in tensors]

    def run(backend_name: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(kind).requires_grad_() for tensor in tensors]
        with backend(backend_name):
            y = operator(*leaves)
        dy = draw(*y.shape, seed=9).to(device, dtype).to(kind)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_kernels_accurate(run, dtype)
