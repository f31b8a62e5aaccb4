"""Triton kernel of products whose rows have widths of their own.

    forward    y[r, :n_r] = s_r x[r, :w_r] W[:n_r, :w_r]^T + b[:n_r],  0 beyond
    dgrad      dx[r, :w_r] = s_r dy[r, :n_r] W[:n_r, :w_r],            0 beyond: the same kernel
    wgrad      dW = (s dy)^T x, db = 1^T dy, of rows that are 0 beyond their widths: one cuBLAS product

A tile reduces over the widest of its rows only, and tiles beyond all their rows write zeros. Saved for
backward: x and the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import capability, precision, unit_stride
from elastic_kernels.triton_ops.gemm import dot, gemm_config, tile_of
from elastic_kernels.triton_ops.registration import first_order, register


@triton.jit(do_not_specialize=["rows"])
def _mixed_width_kernel(
    x_ptr, weight_ptr, bias_ptr, widths_ptr, out_widths_ptr, factors_ptr, y_ptr,
    rows, out_features, in_features,
    stride_x, stride_wn, stride_wk,
    HAS_BIAS: tl.constexpr, HAS_FACTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < rows, offs_n < out_features
    widths = tl.minimum(tl.load(widths_ptr + offs_m, mask=mask_m, other=0), in_features)
    out_widths = tl.load(out_widths_ptr + offs_m, mask=mask_m, other=0)
    wanted = offs_n[None, :] < out_widths[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    last = tl.max(widths, 0)
    if tl.max(out_widths, 0) <= pid_n * BLOCK_N:
        last = last * 0
    for start in range(0, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + offs_k[None, :], mask=offs_k[None, :] < widths[:, None], other=0.0)
        w_ptrs = weight_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
        w = tl.load(w_ptrs, mask=(offs_k < in_features)[:, None] & mask_n[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    if HAS_FACTORS:
        acc *= tl.load(factors_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(wanted, acc, 0.0)
    out = y_ptr + offs_m.to(tl.int64)[:, None] * out_features + offs_n[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def mixed_width_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Tensor,
    out_widths: Tensor,
    factors: Tensor | None,
) -> Tensor:
    """`x` `[rows, k]` with unit stride, `weight` `[n, k]` of any strides -> `[rows, n]`."""
    (rows, width), out = x.shape, weight.shape[0]
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if rows:
        config = gemm_config("dgrad_gelu", out, x.dtype.itemsize, capability(x.device))  # never the wide tile
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(out, config.block_n)
        _mixed_width_kernel[(tiles,)](
            x, weight, bias, widths, out_widths, factors, y,
            rows, out, width,
            x.stride(0), *weight.stride(),
            HAS_BIAS=bias is not None, HAS_FACTORS=factors is not None, PRECISION=precision(x),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


register(
    "mixed_width_product(Tensor x, Tensor weight, Tensor? bias, Tensor widths, Tensor out_widths,"
    " Tensor? factors) -> Tensor",
    mixed_width_product,
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)


def _within(x: Tensor, widths: Tensor) -> Tensor:
    """Rows that are 0 beyond their widths."""
    return x.masked_fill(torch.arange(x.shape[1], device=x.device) >= widths.unsqueeze(1), 0)


class MixedWidthFunction(torch.autograd.Function):
    """The product and its gradients; the weight's has its full shape."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        widths: Tensor,
        out_widths: Tensor,
        factors: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        rounded, low = unit_stride(x.to(dtype)), weight.to(dtype)
        widths, out_widths = widths.contiguous(), out_widths.contiguous()
        ctx.save_for_backward(rounded, low, widths, out_widths, factors)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return torch.ops.elastic_kernels.mixed_width_product(rounded, low, bias, widths, out_widths, factors)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, widths, out_widths, factors = ctx.saved_tensors
        dx = dweight = dbias = None
        dy = unit_stride(dy)
        if ctx.needs_input_grad[0]:
            dx = torch.ops.elastic_kernels.mixed_width_product(
                dy, weight.t(), None, out_widths, widths, factors
            ).to(ctx.dtypes[0])
        dy = _within(dy, out_widths)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[2])
        if ctx.needs_input_grad[1]:
            scaled = dy if factors is None else (dy * factors.unsqueeze(1)).to(dy.dtype)
            dweight = (scaled.t() @ _within(x, widths)).to(ctx.dtypes[1])
        return dx, dweight, dbias, None, None, None, None
