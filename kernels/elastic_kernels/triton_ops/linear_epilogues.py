"""What kernels of linear layers do with a tile of sums: forward, and back through an activation.

A tile comes in slices of columns. Where a block is `ALONE` on its processor, operands of a slice are loaded
with the one before it; else other blocks hide their latency.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elastic_kernels.triton_ops.activations import activate, activation_grad


@triton.jit
def _epilogue_operands(
    bias_ptr, residual_ptr, places, offs_n, mask_m, out_features, stride_r,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Bias and residual of a slice of columns."""
    mask_n = offs_n < out_features
    bias, residual = 0.0, 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "residual":
        mask = mask_m[:, None] & mask_n[None, :]
        residual = tl.load(residual_ptr + places[:, None] * stride_r + offs_n[None, :], mask=mask, other=0.0)
    return bias, residual


@triton.jit
def _fwd_epilogue(
    y, bias, residual, row_scale, y_ptr, u_ptr, gamma_ptr,
    places, offs_n, mask_m, out_features, stride_y,
    EPILOGUE: tl.constexpr, HAS_GAMMA: tl.constexpr,
):  # fmt: skip
    mask_n = offs_n < out_features
    mask = mask_m[:, None] & mask_n[None, :]
    out = places[:, None] * stride_y + offs_n[None, :]
    y += bias
    if EPILOGUE == "residual":
        if HAS_GAMMA:
            y *= tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = y * row_scale + residual.to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    if u_ptr is not None:
        tl.store(u_ptr + out, y, mask=mask)
    if EPILOGUE != "linear" and EPILOGUE != "residual":
        # Of the rounded sum, so that backward finds the same activation in it.
        y = activate(y.to(tl.float32), EPILOGUE, y_ptr.dtype.element_ty == tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + out, y, mask=mask)


@triton.jit
def finish_forward(
    slices, bias_ptr, y_ptr, u_ptr, residual_ptr, gamma_ptr, index_ptr, row_scale_ptr,
    offs_m, mask_m, column, out_features, stride_y, stride_r,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, COLUMNS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile that begins at a column."""
    places = offs_m.to(tl.int64)
    if HAS_INDEX:
        places = tl.load(index_ptr + offs_m, mask=mask_m, other=0)
    row_scale = 1.0
    if HAS_ROW_SCALE:
        row_scale = tl.load(row_scale_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    AHEAD: tl.constexpr = EPILOGUE == "residual" and ALONE
    first = column + tl.arange(0, COLUMNS)
    for part in tl.static_range(len(slices)):
        offs_h = first + part * COLUMNS
        if part == 0 or not AHEAD:
            bias, residual = _epilogue_operands(
                bias_ptr, residual_ptr, places, offs_h, mask_m, out_features, stride_r, HAS_BIAS, EPILOGUE
            )
        this_bias, this_residual = bias, residual
        if AHEAD and part + 1 < len(slices):
            bias, residual = _epilogue_operands(
                bias_ptr, residual_ptr, places, offs_h + COLUMNS, mask_m, out_features, stride_r,
                HAS_BIAS, EPILOGUE,
            )  # fmt: skip
        _fwd_epilogue(
            slices[part], this_bias, this_residual, row_scale, y_ptr, u_ptr, gamma_ptr,
            places, offs_h, mask_m, out_features, stride_y,
            EPILOGUE, HAS_GAMMA,
        )  # fmt: skip


@triton.jit
def finish_backward(
    slices, u_ptr, dx_ptr, act_ptr, sums_ptr, pid_m, offs_m, mask_m, column, in_features,
    EPILOGUE: tl.constexpr, COLUMNS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile of dx that begins at a column; its sums over rows go to row `pid_m`."""
    AHEAD: tl.constexpr = EPILOGUE != "none" and ALONE
    for part in tl.static_range(len(slices)):
        dx = slices[part]
        offs_h = column + part * COLUMNS + tl.arange(0, COLUMNS)
        mask = mask_m[:, None] & (offs_h < in_features)[None, :]
        offset = offs_m.to(tl.int64)[:, None] * in_features + offs_h[None, :]
        if EPILOGUE != "none":
            if part == 0 or not AHEAD:
                u = tl.load(u_ptr + offset, mask=mask, other=0.0)
            this_u = u.to(tl.float32)
            if AHEAD and part + 1 < len(slices):
                following = mask_m[:, None] & (offs_h + COLUMNS < in_features)[None, :]
                u = tl.load(u_ptr + offset + COLUMNS, mask=following, other=0.0)
            dx *= activation_grad(this_u, EPILOGUE, u_ptr.dtype.element_ty == tl.float32)
            if act_ptr is not None:
                activation = activate(this_u, EPILOGUE, u_ptr.dtype.element_ty == tl.float32)
                tl.store(act_ptr + offset, activation.to(act_ptr.dtype.element_ty), mask=mask)
            sums = sums_ptr + pid_m.to(tl.int64) * in_features + offs_h
            tl.store(sums, tl.sum(dx, 0), mask=offs_h < in_features)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
