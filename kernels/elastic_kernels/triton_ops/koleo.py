"""Triton kernels of KoLeo: a program owns a row and looks at all rows of its group.

    d_i = |u_i - u_n(i) + 1e-8|,  loss_i = -log(d_i + 1e-8) / rows
    c_i = -g / (rows d_i (d_i + 1e-8))
    du_i = c_i (u_i - u_n(i) + 1e-8) - sum over n(j) = i of c_j (u_j - u_i + 1e-8)
    dx_i = (du_i - u_i <du_i, u_i>) / |x_i|

Saved for backward: x, and each row's neighbour and distance. Rows of a group come out of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.layer_norm import row_config
from elastic_kernels.triton_ops.registration import first_order, ops, register

EPS = tl.constexpr(1e-8)


@triton.jit
def _rows(x_ptr, row, mask_r, offs_k, width, stride_x):
    """Zeros where the mask is not set."""
    mask = mask_r[:, None] & (offs_k < width)[None, :]
    at = row.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _length(x):
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def _unit(x):
    return x / tl.maximum(_length(x), EPS)[:, None]


@launched("rows")
def _koleo_fwd_kernel(
    x_ptr, losses_ptr, nearest_ptr, distance_ptr,
    rows, width,
    stride_x,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offs_k = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, BLOCK)
    first, every = tl.program_id(0) // rows * rows, tl.full([1], 1, tl.int1)
    u = _unit(_rows(x_ptr, row, every, offs_k, width, stride_x))
    most = tl.full([ROWS], float("-inf"), tl.float32)
    candidate = tl.zeros([ROWS], tl.int32)
    for start in range(0, rows, ROWS):
        other = first + start + tl.arange(0, ROWS)
        inside = other < first + rows
        v = _unit(_rows(x_ptr, other, inside, offs_k, width, stride_x))
        similarity = tl.where(other == row, -1.0, tl.sum(u * v, 1))
        better = inside & (similarity > most)
        most, candidate = tl.where(better, similarity, most), tl.where(better, other, candidate)
    nearest = tl.min(tl.where(most == tl.max(most, 0), candidate, first + rows), 0)
    neighbour = _unit(_rows(x_ptr, nearest + tl.arange(0, 1), every, offs_k, width, stride_x))
    difference = tl.where((offs_k < width)[None, :], u - neighbour + EPS, 0.0)
    distance = tl.sqrt(tl.sum(difference * difference, 1))
    if nearest_ptr is not None:
        tl.store(nearest_ptr + row, nearest)
        tl.store(distance_ptr + row, distance)
    tl.store(losses_ptr + row, tl.where(rows > 1, -tl.log(distance + EPS) / rows, 0.0))


@triton.jit
def _slope(distance):
    """Of -log(d + eps) over d; 0 where d is, as of PyTorch's norm."""
    return tl.where(distance == 0, 0.0, -1 / (tl.maximum(distance, 1e-37) * (distance + EPS)))


@launched("rows")
def _koleo_bwd_kernel(
    grad_ptr, x_ptr, nearest_ptr, distance_ptr, dx_ptr,
    rows, width,
    stride_x,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offs_k = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, BLOCK)
    first, every = tl.program_id(0) // rows * rows, tl.full([1], 1, tl.int1)
    x = _rows(x_ptr, row, every, offs_k, width, stride_x)
    u, norm = _unit(x), _length(x)
    neighbour = _unit(_rows(x_ptr, tl.load(nearest_ptr + row), every, offs_k, width, stride_x))
    du = _slope(tl.load(distance_ptr + row))[:, None] * (u - neighbour + EPS)
    for start in range(0, rows, ROWS):
        other = first + start + tl.arange(0, ROWS)
        inside = other < first + rows
        follows = inside & (tl.load(nearest_ptr + other, mask=inside, other=-1) == row)
        v = _unit(_rows(x_ptr, other, follows, offs_k, width, stride_x))
        slope = tl.where(follows, _slope(tl.load(distance_ptr + other, mask=follows, other=1.0)), 0.0)
        du -= tl.sum(slope[:, None] * (v - u + EPS), 0)[None, :]
    du = tl.where((offs_k < width)[None, :], du, 0.0) * tl.where(rows > 1, tl.load(grad_ptr) / rows, 0.0)
    along = tl.where(norm < EPS, 0.0, tl.sum(du * u, 1))
    dx = (du - u * along[:, None]) / tl.maximum(norm, EPS)[:, None]
    out = dx_ptr + row.to(tl.int64)[:, None] * width + offs_k[None, :]
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=(offs_k < width)[None, :])


def _launches(
    students: list[Tensor], groups: int
) -> Iterator[tuple[int, Tensor, slice, int, dict[str, int]]]:
    """Of each matrix that has rows: number, it, its rows among all, those of a group, and launch settings."""
    start = 0
    for number, x in enumerate(students):
        config = row_config(x.shape[1])
        options = {"ROWS": config.rows, "BLOCK": config.block, "num_warps": config.warps}
        if len(x):
            yield number, x, slice(start, start + len(x)), len(x) // groups, options
        start += len(x)


def koleo_fwd(students: list[Tensor], groups: int, keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, neighbours and distances of all rows of matrices whose rows have a unit stride.

    Neighbours and distances that are not kept are empty.
    """
    losses, *saved = results = _empty_results(students, groups, keep)
    for _, x, part, rows, options in _launches(students, groups):
        kept = (t[part] if keep else None for t in saved)
        _koleo_fwd_kernel[(len(x),)](x, losses[part], *kept, rows, x.shape[1], x.stride(0), **options)
    return results


def _empty_results(students: list[Tensor], groups: int, keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    total, device = sum(len(x) for x in students), students[0].device
    kept = total if keep else 0
    losses, distances = (torch.empty(n, dtype=torch.float32, device=device) for n in (total, kept))
    return losses, torch.empty(kept, dtype=torch.int32, device=device), distances


def koleo_bwd(
    students: list[Tensor], grad: Tensor, nearest: Tensor, distances: Tensor, groups: int
) -> list[Tensor]:
    """Gradients of the matrices, for a gradient of the sum of the losses."""
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in students]
    for number, x, part, rows, options in _launches(students, groups):
        _koleo_bwd_kernel[(len(x),)](
            grad, x, nearest[part], distances[part], results[number],
            rows, x.shape[1], x.stride(0), **options,
        )  # fmt: skip
    return results


register(
    "koleo_fwd(Tensor[] students, int groups, bool keep=True) -> (Tensor, Tensor, Tensor)",
    koleo_fwd,
    _empty_results,
)
register(
    "koleo_bwd(Tensor[] students, Tensor grad, Tensor nearest, Tensor distances, int groups) -> Tensor[]",
    koleo_bwd,
    lambda students, *rest: [x.new_empty(x.shape) for x in students],
)


class KoleoFunction(torch.autograd.Function):
    """The sum over all rows of several matrices."""

    @staticmethod
    def forward(ctx: Any, groups: int, trains: bool, *students: Tensor) -> Tensor:
        rows = [unit_stride(x) for x in students]
        keep = trains and any(ctx.needs_input_grad)
        losses, nearest, distances = ops.koleo_fwd(rows, groups, keep)
        ctx.save_for_backward(nearest, distances, *rows)
        ctx.groups = groups
        return losses.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        nearest, distances, *rows = ctx.saved_tensors
        return None, None, *ops.koleo_bwd(rows, grad, nearest, distances, ctx.groups)
