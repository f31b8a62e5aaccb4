"""Triton kernel of products whose rows have widths of their own.

    forward    y[r, g, :n_r] = s_r x[r, :w_r] W[g, :n_r, :w_r]^T + b[g, :n_r],  0 beyond;  perhaps act(y)
    dgrad      dx[r, :w_r] = s_r sum_g dy[r, g, :n_r] W[g, :n_r, :w_r],  0 beyond: the same kernel
    wgrad      dW[g] = (s dy[g])^T x, db = 1^T dy, of rows that are 0 beyond their widths: one cuBLAS product

g: one matrix, or q, k and v, or a gate and its units. A tile reduces over the widest of its rows only, and
tiles beyond all their rows write zeros. Saved for backward: x, the weight, and sums before an activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.activations import ACTIVATION_BACKWARD, activate
from elastic_kernels.triton_ops.device import cdiv, precision, unit_stride
from elastic_kernels.triton_ops.gemm import dot, launch_options, narrow_config, tile_of
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import first_order, ops, register
from elastic_kernels.working_weights import working_copy


@launched("rows")
def _mixed_width_kernel(
    x_ptr, weight_ptr, bias_ptr, widths_ptr, out_widths_ptr, factors_ptr, y_ptr, u_ptr,
    rows, summed, out_features, in_features,
    stride_x, stride_xg, stride_wg, stride_wn, stride_wk,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Of a matrix for each program of axis 1, or of the sum over several (`summed`)."""
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP_M)
    matrix = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < rows, offs_n < out_features
    widths = tl.minimum(tl.load(widths_ptr + offs_m, mask=mask_m, other=0), in_features)
    out_widths = tl.load(out_widths_ptr + offs_m, mask=mask_m, other=0)
    wanted = offs_n[None, :] < out_widths[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    steps = tl.cdiv(tl.max(widths, 0).to(tl.int32), BLOCK_K)
    if tl.max(out_widths, 0) <= pid_n * BLOCK_N:
        steps = steps * 0
    for step in range(0, summed * steps):
        group = step // steps
        offs_k = (step % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < in_features
        x_ptrs = x_rows + group * stride_xg + offs_k[None, :]
        # Masks that are widths of rows would allow scalar loads only.
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        x = tl.where(offs_k[None, :] < widths[:, None], x, 0.0)
        w_ptrs = weight_ptr + (matrix + group) * stride_wg
        w_ptrs += offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    if factors_ptr is not None:
        acc *= tl.load(factors_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + matrix * out_features + offs_n, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y = tl.where(wanted, acc, 0.0).to(y_ptr.dtype.element_ty)
    places = (offs_m.to(tl.int64)[:, None] * tl.num_programs(1) + matrix) * out_features + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if u_ptr is not None:
        tl.store(u_ptr + places, y, mask=mask)
    if ACTIVATION != "":  # of the rounded sum, and 0 where that is
        y = activate(y.to(tl.float32), ACTIVATION, y_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: tuple[Tensor, Tensor],
    factors: Tensor | None,
    y: Tensor,
    *,
    u: Tensor | None = None,
    kind: str = "",
) -> Tensor:
    """`x` `[rows, k]`, `weight` `[g, n, k]` -> y `[rows, g, n]`, or of x `[rows, g, k]` the sum, `[rows, n]`.

    x has unit stride.
    """
    (rows, groups), (_, out, width) = (x.shape[0], weight.shape[0]), weight.shape
    if rows:
        config = narrow_config(x.dtype.itemsize)
        tiles = cdiv(rows, config.block_m) * cdiv(out, config.block_n)
        summed = groups if x.dim() == 3 else 1
        _mixed_width_kernel[(tiles, groups // summed)](
            x, weight, bias, *widths, factors, y, u,
            rows, summed, out, width,
            x.stride(0), x.stride(1) if summed > 1 else 0, *weight.stride(),
            ACTIVATION=kind, PRECISION=precision(x),
            **launch_options(config),
        )  # fmt: skip
    return y


def mixed_width_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Tensor,
    out_widths: Tensor,
    factors: Tensor | None,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`x` `[rows, k]`, `weight` `[g, n, k]`, `bias` `[g * n]` -> sums and y `[rows, g, n]`.

    Sums before the `kind` of activation, if backward is to read them, are else empty.
    """
    u, y = _sums_and_activation(x, weight, bias, widths, out_widths, factors, kind, keep)
    _product(x, weight, bias, (widths, out_widths), factors, y, u=u if keep else None, kind=kind)
    return u, y


def _sums_and_activation(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shapes = ((rows, *weight.shape[:2]) for rows in (len(x) if rest[-1] else 0, len(x)))
    u, y = (torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes)
    return u, y


def mixed_width_dgrad(
    dy: Tensor, weight: Tensor, widths: Tensor, out_widths: Tensor, factors: Tensor | None
) -> Tensor:
    """`dy` `[rows, g, n]`, `weight` `[g, n, k]` -> dx `[rows, k]`."""
    dx = torch.empty(dy.shape[0], weight.shape[2], dtype=dy.dtype, device=dy.device)
    return _product(dy, weight.mT, None, (out_widths, widths), factors, dx)


register(
    "mixed_width_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor widths, Tensor out_widths,"
    " Tensor? factors, str kind, bool keep) -> (Tensor, Tensor)",
    mixed_width_fwd,
    _sums_and_activation,
)
register(
    "mixed_width_dgrad(Tensor dy, Tensor weight, Tensor widths, Tensor out_widths, Tensor? factors)"
    " -> Tensor",
    mixed_width_dgrad,
    lambda dy, weight, *rest: dy.new_empty(dy.shape[0], weight.shape[2]),
)


def _within(x: Tensor, widths: Tensor) -> Tensor:
    """`[rows, ..., n]` that is 0 beyond the widths of rows."""
    beyond = torch.arange(x.shape[-1], device=x.device) >= widths.unsqueeze(1)
    return x.masked_fill(beyond if x.dim() == 2 else beyond.unsqueeze(1), 0)


class MixedWidthFunction(torch.autograd.Function):
    """The product with g stacked matrices, `[rows, k]` -> `[rows, g, n]`; the weight's gradient is whole."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        widths: Tensor,
        out_widths: Tensor,
        factors: Tensor | None,
        groups: int,
        dtype: torch.dtype,
        activation: str,
        trains: bool,
    ) -> Tensor:
        rounded, copy = unit_stride(x.to(dtype)), working_copy(weight, None, dtype).weight
        low = copy.to(dtype).unflatten(0, (groups, -1))
        widths, out_widths = widths.contiguous(), out_widths.contiguous()
        keep = trains and bool(activation)
        u, y = ops.mixed_width_fwd(rounded, low, bias, widths, out_widths, factors, activation, keep)
        ctx.save_for_backward(rounded, low, widths, out_widths, factors, u if keep else None)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.activation = activation
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, widths, out_widths, factors, u = ctx.saved_tensors
        dx = dweight = dbias = None
        if u is not None:
            dy = ACTIVATION_BACKWARD[ctx.activation](dy, u)
        dy = unit_stride(dy)
        if ctx.needs_input_grad[0]:
            dx = ops.mixed_width_dgrad(dy, weight, widths, out_widths, factors).to(ctx.dtypes[0])
        dy = _within(dy, out_widths).flatten(1)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[2])
        if ctx.needs_input_grad[1]:
            scaled = dy if factors is None else (dy * factors.unsqueeze(1)).to(dy.dtype)
            dweight = (scaled.t() @ _within(x, widths)).to(ctx.dtypes[1])
        return dx, dweight, dbias, None, None, None, None, None, None, None
