"""Triton kernels of linear layers over the corners of shared weights, with what surrounds them fused.

    y[g] = s x W[g, :n, :k]^T + b[g, :n]                  g: one matrix, or q, k and v
    a = act(y), y kept for backward
    out[rows] = residual[rows] + row_scale * gamma * y

Weights are read in place: a pointer, strides, and run-time sizes. A tile may have columns `BESIDE` it. The
row choice of stochastic depth is an index in the forward's epilogue, and a gathering pass (`branch_grad`) in
the backward.

A table of timed settings may choose persistent programs for fused products, from Hopper on, which load tiles
by tensor descriptors, or QuACK's kernel for sums of whole rows. Every product without a fusion goes to cuBLAS
on a strided view (`gemm.PROVIDERS`). Saved for backward: x, and y where an activation follows
(`activations.py`). The backward is in `linear_dgrad.py` and `linear_wgrad.py`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import capability, cdiv, precision
from elastic_kernels.triton_ops.gemm import (
    PROVIDERS,
    Form,
    config_for,
    dot,
    gemm_config,
    is_described,
    launch_options,
    quack_residual,
    slices_of,
    tile_of,
)
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.linear_epilogues import finish_forward
from elastic_kernels.triton_ops.linear_persistent import launch_persistent
from elastic_kernels.triton_ops.registration import register


@launched("rows")
def _linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, u_ptr, residual_ptr, gamma_ptr, index_ptr, row_scale_ptr,
    rows, out_features, in_features,
    stride_x, stride_wg, stride_wn, stride_wk, stride_bg, stride_y, stride_yg, stride_r,
    scale,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BESIDE: tl.constexpr = None,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N if BESIDE is None else BLOCK_N + BESIDE
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, TILE), GROUP_M)
    group = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * TILE + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < rows, offs_n < out_features
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
    w_rows = weight_ptr + group * stride_wg + offs_k[:, None] * stride_wk
    w_ptrs = w_rows + offs_n[None, :] * stride_wn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BESIDE is not None:
        offs_b = pid_n * TILE + BLOCK_N + tl.arange(0, BESIDE)
        beside_ptrs = w_rows + offs_b[None, :] * stride_wn
        acc_beside = tl.zeros([BLOCK_M, BESIDE], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        mask_k = offs_k < in_features - start
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
        if BESIDE is not None:
            w = tl.load(beside_ptrs, mask=mask_k[:, None] & (offs_b < out_features)[None, :], other=0.0)
            acc_beside = dot(x, w, acc_beside, PRECISION)
            beside_ptrs += BLOCK_K * stride_wk
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    slices = slices_of(
        acc * scale, BLOCK_M, BLOCK_N, 32 if EPILOGUE == "residual" or BESIDE is not None else 64
    )
    if BESIDE is not None:
        slices += slices_of(acc_beside * scale, BLOCK_M, BESIDE, 32)
    if HAS_BIAS:
        bias_ptr += group * stride_bg
    finish_forward(
        slices, bias_ptr, y_ptr + group * stride_yg, u_ptr, residual_ptr, gamma_ptr, index_ptr, row_scale_ptr,
        offs_m, mask_m, pid_n * TILE, out_features, stride_y, stride_r,
        HAS_BIAS, EPILOGUE, HAS_GAMMA, HAS_INDEX, HAS_ROW_SCALE, TILE // len(slices), BLOCK_N > 128,
    )  # fmt: skip


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    scale: float,
    *,
    u: Tensor | None = None,
    kind: str = "",
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """Launch the forward of `x` `[rows, k]` with `weight` `[groups, n, k]` into `y`; with a `kind` of
    activation, `u` gets the sums before it."""
    rows, (groups, out, width) = x.shape[0], weight.shape
    if not rows:
        return
    form: Form = "gelu" if kind else "linear"
    if residual is not None:
        form = "residual_plain" if gamma is index is row_scale is None else "residual"
    config = config_for(form, x, out, width)
    if (config.persistent or config.provider == "quack") and not is_described(
        x, weight[0], y, y if residual is None else residual
    ):
        config = gemm_config(form, out, x.dtype.itemsize, capability(x.device))
    if config.provider == "quack" and residual is not None:
        quack_residual(y, x, weight[0], bias, residual, scale)
        return
    tiles = cdiv(rows, config.block_m) * cdiv(out, config.columns)
    flags = {
        "HAS_BIAS": bias is not None, "EPILOGUE": kind or ("linear" if residual is None else "residual"),
        "HAS_GAMMA": gamma is not None, "HAS_INDEX": index is not None,
        "HAS_ROW_SCALE": row_scale is not None, "PRECISION": precision(x), **launch_options(config),
    }  # fmt: skip
    stride_r = 0 if residual is None else residual.stride(0)
    if config.persistent:
        launch_persistent(
            config, tiles, x, weight, bias, y, u, residual, gamma, index, row_scale, None, None,
            rows, out, width, x.stride(0), weight.stride(1), y.stride(0), stride_r, scale,
            BACKWARD=False, **flags,
        )  # fmt: skip
        return
    _linear_fwd_kernel[(tiles, groups)](
        x, weight, bias, y, u, residual, gamma, index, row_scale,
        rows, out, width,
        x.stride(0), *weight.stride(), 0 if bias is None else bias.stride(0),
        y.stride(0), y.stride(1) if groups > 1 else 0, stride_r,
        scale, **flags,
    )  # fmt: skip


def stacked(weight: Tensor) -> Tensor | None:
    """`[groups, n, k]` as one matrix `[groups * n, k]`, if the matrices lie so in memory."""
    groups, out, _ = weight.shape
    return weight.flatten(0, 1) if groups == 1 or weight.stride(0) == out * weight.stride(1) else None


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`x` `[rows, k]`, `weight` `[groups, n, k]`, `bias` `[groups, n]` -> `[rows, (groups,) n]`."""
    groups, out, _ = weight.shape
    shape = (x.shape[0], groups, out) if groups > 1 else (x.shape[0], out)
    matrix = stacked(weight) if PROVIDERS["linear"] == "cublas" else None
    if matrix is None:
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        _fwd(x, weight, bias, y, scale)
        return y
    if bias is None:
        y = torch.addmm(x.new_empty(groups * out), x, matrix.t(), beta=0, alpha=scale)
    else:
        y = torch.addmm(bias.reshape(-1).to(x.dtype), x, matrix.t(), alpha=scale)
    return y.view(shape) if groups > 1 else y  # a view out of a Function must not be overwritten


def linear_act_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, kind: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """As `linear_fwd` of one group: the sums, if backward is to read them, and their activation of a kind."""
    u, y = _sums_and_activation(x, weight, bias, scale, kind, keep)
    _fwd(x, weight, bias, y, scale, u=u if keep else None, kind=kind)
    return u, y


def _sums_and_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, kind: str, keep: bool
) -> tuple[Tensor, Tensor]:
    shapes = (x.shape[0] if keep else 0, weight.shape[1]), (x.shape[0], weight.shape[1])
    u, y = (torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes)
    return u, y


def linear_residual_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
    index: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
) -> None:
    """Add the branch to the rows of `residual` in `index` (or all) in place."""
    _fwd(x, weight, bias, residual, scale, residual=residual, gamma=gamma, index=index, row_scale=row_scale)


def linear_residual_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
    index: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """`residual` with the branch added to the rows in `index` (or all), as a new tensor."""
    if index is None:
        source, out = residual, torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    else:
        source = out = residual.clone(memory_format=torch.contiguous_format)
    _fwd(x, weight, bias, out, scale, residual=source, gamma=gamma, index=index, row_scale=row_scale)
    return out


register(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, float scale) -> Tensor",
    linear_fwd,
    lambda x, weight, bias, scale: x.new_empty(
        x.shape[0], *(weight.shape[:2] if weight.shape[0] > 1 else weight.shape[1:2])
    ),
)
register(
    "linear_act_fwd(Tensor x, Tensor weight, Tensor? bias, float scale, str kind, bool keep)"
    " -> (Tensor, Tensor)",
    linear_act_fwd,
    _sums_and_activation,
)
register(
    "linear_residual_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? gamma,"
    " Tensor? index, Tensor? row_scale, float scale) -> Tensor",
    linear_residual_fwd,
    lambda x, weight, bias, residual, *rest: residual.new_empty(residual.shape),
)
register(
    "linear_residual_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) residual, Tensor? gamma,"
    " Tensor? index, Tensor? row_scale, float scale) -> ()",
    linear_residual_,
)
