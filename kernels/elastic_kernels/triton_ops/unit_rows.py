"""Triton kernels of rows of length one, or of a trained length.

    n = max(|x|, 1e-12),  y = g x / n
    dg = <dy, x> / n,  dx = g / n (dy - x <dy, x> / n^2)

Saved for backward: x and g; the norms are made again. Bytes: forward reads and writes a matrix once, backward
reads two and writes one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv, unit_stride
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.layer_norm import row_config
from elastic_kernels.triton_ops.registration import first_order, ops, register

EPS = tl.constexpr(1e-12)


@launched("rows")
def _unit_rows_fwd_kernel(
    x_ptr, gain_ptr, y_ptr,
    rows, width,
    stride_x,
    HAS_GAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_r, offs_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask_r = offs_r < rows
    mask, row = mask_r[:, None] & (offs_k < width)[None, :], offs_r.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * stride_x + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS)
    if HAS_GAIN:
        factor *= tl.load(gain_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    y = x * factor[:, None]
    tl.store(y_ptr + row * width + offs_k[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@launched("rows")
def _unit_rows_bwd_kernel(
    dy_ptr, x_ptr, gain_ptr, dx_ptr, dgain_ptr,
    rows, width,
    stride_y, stride_x,
    HAS_GAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_r, offs_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask_r = offs_r < rows
    mask, row = mask_r[:, None] & (offs_k < width)[None, :], offs_r.to(tl.int64)[:, None]
    dy = tl.load(dy_ptr + row * stride_y + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * stride_x + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    factor = 1 / tl.maximum(norm, EPS)
    unit = x * factor[:, None]
    along = tl.sum(dy * unit, 1)
    if HAS_GAIN:
        tl.store(dgain_ptr + offs_r, along.to(dgain_ptr.dtype.element_ty), mask=mask_r)
        factor *= tl.load(gain_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    dx = factor[:, None] * (dy - unit * tl.where(norm < EPS, 0.0, along)[:, None])
    tl.store(dx_ptr + row * width + offs_k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def unit_rows_fwd(x: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of a unit stride -> `[rows, d]`."""
    (rows, width), config = x.shape, row_config(x.shape[1])
    y = torch.empty(rows, width, dtype=dtype, device=x.device)
    if rows:
        _unit_rows_fwd_kernel[(cdiv(rows, config.rows),)](
            x, gain, y,
            rows, width,
            x.stride(0),
            HAS_GAIN=gain is not None, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return y


def unit_rows_bwd(dy: Tensor, x: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the gain (empty without one)."""
    (rows, width), config = x.shape, row_config(x.shape[1])
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    dgain = torch.empty(0 if gain is None else rows, 1, dtype=x.dtype, device=x.device)
    if rows:
        _unit_rows_bwd_kernel[(cdiv(rows, config.rows),)](
            dy, x, gain, dx, dgain,
            rows, width,
            dy.stride(0), x.stride(0),
            HAS_GAIN=gain is not None, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return dx, dgain


register(
    "unit_rows_fwd(Tensor x, Tensor? gain, ScalarType dtype) -> Tensor",
    unit_rows_fwd,
    lambda x, gain, dtype: x.new_empty(x.shape, dtype=dtype),
)
register(
    "unit_rows_bwd(Tensor dy, Tensor x, Tensor? gain) -> (Tensor, Tensor)",
    unit_rows_bwd,
    lambda dy, x, gain: (x.new_empty(x.shape), x.new_empty(0 if gain is None else len(x), 1)),
)


class UnitRowsFunction(torch.autograd.Function):
    """`unit_rows` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
        x = unit_stride(x)
        gain = None if gain is None else gain.contiguous()
        ctx.save_for_backward(x, gain)
        return ops.unit_rows_fwd(x, gain, dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        dx, dgain = ops.unit_rows_bwd(unit_stride(dy), x, gain)
        return dx, None if gain is None else dgain, None
