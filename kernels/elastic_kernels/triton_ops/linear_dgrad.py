"""The product that goes back through a linear layer, perhaps through the activation before it, too.

    dx = s sum_g (dy[g] * gamma) W[g]                     optionally * act'(u), and act(u) again

Sums over rows for the bias before the activation come out of the kernel, too. Through an activation a table
of timed settings may choose persistent programs, where LayerScale is in the weights. Without a fusion it is
cuBLAS's product (`gemm.PROVIDERS`).
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
    slices_of,
    tile_of,
)
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.linear import stacked
from elastic_kernels.triton_ops.linear_epilogues import finish_backward
from elastic_kernels.triton_ops.linear_persistent import launch_persistent
from elastic_kernels.triton_ops.registration import register

# Features that are reduced over, from which on the loop of a wide tile makes up for its longer epilogue: by
# `python -m benchmarks predict`, not timed yet.
LONG = 640


@launched("rows")
def _linear_dgrad_kernel(
    dy_ptr, weight_ptr, gamma_ptr, u_ptr, dx_ptr, act_ptr, sums_ptr,
    rows, groups, out_features, in_features,
    stride_y, stride_yg, stride_wg, stride_wn, stride_wk,
    scale,
    GROUPED: tl.constexpr, HAS_GAMMA: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BESIDE: tl.constexpr = None,
):  # fmt: skip
    """dx of BLOCK_M rows and BLOCK_N input features, reducing over output features by BLOCK_K."""
    TILE: tl.constexpr = BLOCK_N if BESIDE is None else BLOCK_N + BESIDE
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(in_features, TILE), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * TILE + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < rows, offs_n < in_features
    dy_rows = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_y
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BESIDE is not None:
        offs_b = pid_n * TILE + BLOCK_N + tl.arange(0, BESIDE)
        acc_beside = tl.zeros([BLOCK_M, BESIDE], tl.float32)
    steps = tl.cdiv(out_features, BLOCK_K)
    for step in range(0, groups * steps):
        group, offs_k = 0, step * BLOCK_K + tl.arange(0, BLOCK_K)
        if GROUPED:
            group, offs_k = step // steps, (step % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < out_features
        dy_ptrs = dy_rows + group * stride_yg + offs_k[None, :]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if HAS_GAMMA:
            gamma = tl.load(gamma_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            dy = (dy.to(tl.float32) * gamma[None, :]).to(dy.dtype)
        w_rows = weight_ptr + group * stride_wg + offs_k[:, None] * stride_wn
        w_ptrs = w_rows + offs_n[None, :] * stride_wk
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(dy, w, acc, PRECISION)
        if BESIDE is not None:
            w_ptrs = w_rows + offs_b[None, :] * stride_wk
            w = tl.load(w_ptrs, mask=mask_k[:, None] & (offs_b < in_features)[None, :], other=0.0)
            acc_beside = dot(dy, w, acc_beside, PRECISION)
    slices = slices_of(acc * scale, BLOCK_M, BLOCK_N, 64 if EPILOGUE == "none" and BESIDE is None else 32)
    if BESIDE is not None:
        slices += slices_of(acc_beside * scale, BLOCK_M, BESIDE, 32)
    finish_backward(
        slices, u_ptr, dx_ptr, act_ptr, sums_ptr, pid_m, offs_m, mask_m, pid_n * TILE, in_features,
        EPILOGUE, TILE // len(slices), BLOCK_N > 128,
    )  # fmt: skip


def _form(dy: Tensor, gamma: Tensor | None, kind: str) -> Form:
    """Through an activation: others than bf16's GELU would spill with its wide tile."""
    wide = kind == "gelu" and gamma is None and dy.dtype == torch.bfloat16 and dy.shape[1] >= LONG
    return "dgrad_gelu" if wide else "dgrad_act"


def _dgrad(
    dy: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    u: Tensor | None,
    scale: float,
    kind: str,
    again: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx; through an activation also its values `again`, and the sums of dx over the rows of each tile."""
    rows, (groups, out, width) = dy.shape[0], weight.shape
    form: Form = "dgrad" if u is None else _form(dy, gamma, kind)
    config = config_for(form, dy, width, out)
    if config.persistent and (gamma is not None or not is_described(dy, weight[0])):
        config = gemm_config(form, width, dy.dtype.itemsize, capability(dy.device))  # as many rows a tile
    tiles = cdiv(rows, config.block_m)
    dx = torch.empty(rows, width, dtype=dy.dtype, device=dy.device)
    activation, sums = None, None
    if u is not None:
        activation = torch.empty(rows if again else 0, width, dtype=dy.dtype, device=dy.device)
        sums = torch.empty(tiles, 1, width, dtype=torch.float32, device=dy.device)
    if not rows:
        return dx, activation, sums
    act, options = activation if again else None, launch_options(config)
    tiles *= cdiv(width, config.columns)
    if config.persistent:
        launch_persistent(
            config, tiles, dy, weight, None, dx, u, None, None, None, None, act, sums,
            rows, width, out, dy.stride(0), weight.stride(1), width, 0, scale,
            BACKWARD=True, HAS_BIAS=False, EPILOGUE=kind, HAS_GAMMA=False, HAS_INDEX=False,
            HAS_ROW_SCALE=False, PRECISION=precision(dy), **options,
        )  # fmt: skip
        return dx, activation, sums
    _linear_dgrad_kernel[(tiles,)](
        dy, weight, gamma, u, dx, act, sums,
        rows, groups, out, width,
        dy.stride(0), dy.stride(1) if groups > 1 else 0, *weight.stride(),
        scale,
        GROUPED=groups > 1, HAS_GAMMA=gamma is not None, EPILOGUE=kind, PRECISION=precision(dy), **options,
    )  # fmt: skip
    return dx, activation, sums


def linear_dgrad(dy: Tensor, weight: Tensor, gamma: Tensor | None, scale: float) -> Tensor:
    """`dy` `[rows, n]` or `[rows, groups, n]`, `weight` `[groups, n, k]` -> dx `[rows, k]`."""
    matrix = stacked(weight) if gamma is None and PROVIDERS["dgrad"] == "cublas" else None
    if matrix is None:
        return _dgrad(dy, weight, gamma, None, scale, "none")[0]
    return torch.addmm(dy.new_empty(weight.shape[2]), dy.flatten(1), matrix, beta=0, alpha=scale)


def linear_dgrad_act(
    dy: Tensor, weight: Tensor, gamma: Tensor | None, u: Tensor, scale: float, kind: str, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Through a layer and the activation before it, whose `u` is contiguous.

    Returns:
        du, act(u) `again` for the layer's wgrad, or empty, and sums of du for a bias, fp32 `[parts, 1, k]`.
    """
    du, activation, sums = _dgrad(dy, weight, gamma, u, scale, kind, again)
    assert activation is not None and sums is not None
    return du, activation, sums


register(
    "linear_dgrad(Tensor dy, Tensor weight, Tensor? gamma, float scale) -> Tensor",
    linear_dgrad,
    lambda dy, weight, gamma, scale: dy.new_empty(dy.shape[0], weight.shape[2]),
)
register(
    "linear_dgrad_act(Tensor dy, Tensor weight, Tensor? gamma, Tensor u, float scale, str kind, bool again)"
    " -> (Tensor, Tensor, Tensor)",
    linear_dgrad_act,
    lambda dy, weight, gamma, u, scale, kind, again: (
        dy.new_empty(u.shape),
        dy.new_empty(len(u) if again else 0, u.shape[1]),
        dy.new_empty(
            cdiv(len(u), config_for(_form(dy, gamma, kind), dy, u.shape[1], dy.shape[1]).block_m),
            1,
            u.shape[1],
            dtype=torch.float32,
        ),
    ),
)
