"""Triton kernels of RMSNorm over the active width, with an optional gather of rows before it.

    y = x * rstd * weight[:w],  rstd = 1 / sqrt(mean(x^2) + eps)
    g = dy * weight,  dx = rstd * (g - xhat * mean_k(g * xhat)),  dw = sum dy * xhat,  xhat = x * rstd

Each program of the backward keeps a partial gradient of the weight in registers; partial sums are summed in a
fixed order. Saved for backward: x, and fp32 rstd of each row. Bytes: forward reads and writes rows * w
elements, backward reads twice and writes once that much.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv, processors, unit_stride
from elastic_kernels.triton_ops.layer_norm import PROGRAMS_PER_SM, row_config
from elastic_kernels.triton_ops.registration import first_order, register


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, index_ptr, y_ptr, rstd_ptr,
    rows, width,
    stride_x,
    eps,
    HAS_INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, BLOCK)
    mask_r, mask_k = offs_r < rows, offs_k < width
    mask = mask_r[:, None] & mask_k[None, :]
    place = offs_r.to(tl.int64)
    source = place
    if HAS_INDEX:
        source = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
    x = tl.load(x_ptr + source[:, None] * stride_x + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + place[:, None] * width + offs_k[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, index_ptr, rstd_ptr, dx_ptr, shares_ptr,
    rows, width,
    stride_x,
    HAS_INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    offs_k = tl.arange(0, BLOCK)
    mask_k = offs_k < width
    weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        offs_r = start + tl.arange(0, ROWS)
        mask_r = offs_r < rows
        mask = mask_r[:, None] & mask_k[None, :]
        place = offs_r.to(tl.int64)
        source = place
        if HAS_INDEX:
            source = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
        dy = tl.load(dy_ptr + place[:, None] * width + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + source[:, None] * stride_x + offs_k[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        xhat = x.to(tl.float32) * rstd
        dweight += tl.sum(dy * xhat, 0)
        g = dy * weight[None, :]
        dx = (g - xhat * (tl.sum(g * xhat, 1) / width)[:, None]) * rstd
        out = dx_ptr + source[:, None] * width + offs_k[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(shares_ptr + program.to(tl.int64) * width + offs_k, dweight, mask=mask_k)


def rms_norm_fwd(
    x: Tensor, weight: Tensor, index: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`x` `[tokens, w]` -> y `[rows, w]` in a dtype, fp32 rstd `[rows]`."""
    rows, width = (x if index is None else index).shape[0], x.shape[1]
    y = torch.empty(rows, width, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        config = row_config(width)
        _rms_norm_fwd_kernel[(cdiv(rows, config.rows),)](
            x, weight, index, y, rstd,
            rows, width,
            x.stride(0),
            eps,
            HAS_INDEX=index is not None, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return y, rstd


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weight in full shape; `dy` `[rows, w]` is contiguous."""
    rows, width = dy.shape
    make = torch.empty if index is None else torch.zeros
    dx = make(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
    if rows:
        config = row_config(width)
        programs = min(cdiv(rows, config.rows), PROGRAMS_PER_SM * processors(x.device))
        partials = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _rms_norm_bwd_kernel[(programs,)](
            dy, x, weight, index, rstd, dx, partials,
            rows, width,
            x.stride(0),
            HAS_INDEX=index is not None, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
        dweight[:width] = partials.sum(0)
    return dx, dweight


register(
    "rms_norm_fwd(Tensor x, Tensor weight, Tensor? index, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    rms_norm_fwd,
    lambda x, weight, index, eps, dtype: (
        x.new_empty((x if index is None else index).shape[0], x.shape[1], dtype=dtype),
        x.new_empty((x if index is None else index).shape[0], dtype=torch.float32),
    ),
)
register(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? index, Tensor rstd) -> (Tensor, Tensor)",
    rms_norm_bwd,
    lambda dy, x, weight, *rest: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


class RmsNormFunction(torch.autograd.Function):
    """RMSNorm of all or chosen rows, with a gradient of the weight's full shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, index: Tensor | None) -> Tensor:
        x, dtype = unit_stride(x), torch.promote_types(x.dtype, weight.dtype)
        y, rstd = torch.ops.elastic_kernels.rms_norm_fwd(x, weight, index, eps, dtype)
        ctx.save_for_backward(x, weight, index, rstd)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, rstd = ctx.saved_tensors
        gradients = torch.ops.elastic_kernels.rms_norm_bwd(dy.contiguous(), x, weight, index, rstd)
        return *gradients, None, None
