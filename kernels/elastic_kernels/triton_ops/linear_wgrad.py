"""Triton kernels of the gradients of a linear layer's weight, bias and LayerScale.

    P[g] = s dy[g]^T x,  dW = gamma * P,  db = gamma * sum dy,  dgamma = rowsum(P * W) + b * sum dy

dW is written into a corner of the largest network's gradient, or alone; dgamma needs no saved activation. The
long reduction over rows is split so that small corners fill the device; the partial sums are added in a fixed
order, so that results repeat bitwise. Columns of dy are summed for the bias by a kernel of its own: among
programs of the product, which hold as much shared memory, such sums took whole processors and a second wave.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import precision, processors
from elastic_kernels.triton_ops.gemm import (
    GemmConfig,
    config_for,
    dot,
    launch_options,
    slices_of,
    tile_of,
)
from elastic_kernels.triton_ops.registration import register


@triton.jit(do_not_specialize=["rows", "split_rows"])
def _linear_wgrad_kernel(
    dy_ptr, x_ptr, dweight_ptr, partial_ptr,
    rows, split_rows, out_features, in_features,
    stride_y, stride_yg, stride_x, stride_dg, stride_dn,
    scale,
    APART: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """P of BLOCK_M output and BLOCK_N input features, reducing over a split's rows by BLOCK_K."""
    tiles_n, tiles_k = tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N)
    pid_n, pid_k = tile_of(tl.program_id(0), tiles_n, tiles_k, GROUP_M)
    group, split = tl.program_id(1), tl.program_id(2)
    offs_n = pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, mask_k = offs_n < out_features, offs_k < in_features
    first, last = split * split_rows, tl.minimum((split + 1) * split_rows, rows)
    dy_columns = dy_ptr + group * stride_yg + offs_n[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        offs_r = start + tl.arange(0, BLOCK_K)
        mask_r, places = offs_r < last, offs_r.to(tl.int64)
        dy = tl.load(
            dy_columns + places[None, :] * stride_y, mask=mask_n[:, None] & mask_r[None, :], other=0.0
        )
        x_ptrs = x_ptr + places[:, None] * stride_x + offs_k[None, :]
        x = tl.load(x_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        acc = dot(dy, x, acc, PRECISION)
    if APART:
        place = (split * tl.num_programs(1) + group).to(tl.int64) * out_features
        ends = partial_ptr + (place + offs_n)[:, None] * in_features + offs_k[None, :]
        tl.store(ends, acc * scale, mask=mask_n[:, None] & mask_k[None, :])
    else:
        slices = slices_of(acc * scale, BLOCK_M, BLOCK_N)
        SLICES: tl.constexpr = len(slices)
        ends = dweight_ptr + group * stride_dg + offs_n[:, None] * stride_dn
        for part in tl.static_range(SLICES):
            offs_h = pid_k * BLOCK_N + part * (BLOCK_N // SLICES) + tl.arange(0, BLOCK_N // SLICES)
            dweight = slices[part].to(dweight_ptr.dtype.element_ty)
            tl.store(ends + offs_h[None, :], dweight, mask=mask_n[:, None] & (offs_h < in_features)[None, :])


@triton.jit(do_not_specialize=["rows", "share_rows"])
def _linear_bias_shares_kernel(
    dy_ptr, shares_ptr,
    rows, share_rows, out_features,
    stride_y, stride_yg,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK columns of dy of a group over a share of the rows."""
    share, group = tl.program_id(1), tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < out_features
    first, last = share * share_rows, tl.minimum((share + 1) * share_rows, rows)
    columns = dy_ptr + group * stride_yg + offs_n[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        offs_r = start + tl.arange(0, ROWS)
        mask = (offs_r < last)[:, None] & mask_n[None, :]
        dy = tl.load(columns + offs_r.to(tl.int64)[:, None] * stride_y, mask=mask, other=0.0)
        total += dy.to(tl.float32)
    place = (share * tl.num_programs(2) + group) * out_features
    tl.store(shares_ptr + place + offs_n, tl.sum(total, 0), mask=mask_n)


@triton.jit(do_not_specialize=["splits"])
def _linear_wgrad_finish_kernel(
    partial_ptr, weight_ptr, gamma_ptr, dweight_ptr, gamma_shares_ptr,
    splits, out_features, in_features,
    stride_dg, stride_dn, stride_wg, stride_wn, stride_wk,
    HAS_GAMMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of a tile of P; the weight's gradient, and the tile's share of LayerScale's."""
    pid_k, pid_n, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n, offs_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < out_features, offs_k < in_features
    mask = mask_n[:, None] & mask_k[None, :]
    p = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for split in range(0, splits):
        place = (split * tl.num_programs(2) + group).to(tl.int64) * out_features
        p += tl.load(
            partial_ptr + (place + offs_n)[:, None] * in_features + offs_k[None, :], mask=mask, other=0.0
        )
    if HAS_GAMMA:
        w_ptrs = weight_ptr + group * stride_wg + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
        w = tl.load(w_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(gamma_shares_ptr + pid_k * out_features + offs_n, tl.sum(p * w, 1), mask=mask_n)
        p *= tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    ends = dweight_ptr + group * stride_dg + offs_n[:, None] * stride_dn + offs_k[None, :]
    tl.store(ends, p.to(dweight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["shares", "tiles"])
def _linear_vector_grads_kernel(
    bias_shares_ptr, gamma_shares_ptr, bias_ptr, gamma_ptr, dbias_ptr, dgamma_ptr,
    shares, tiles, out_features, largest,
    HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Full-shape gradients of bias and LayerScale of a group from their shares; zero outside the corner."""
    group = tl.program_id(1)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active, inside = offs < out_features, offs < largest
    dbias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        for share in range(0, shares):
            place = (share * tl.num_programs(1) + group) * out_features
            dbias += tl.load(bias_shares_ptr + place + offs, mask=active, other=0.0)
    if HAS_GAMMA:
        dgamma = tl.zeros([BLOCK], tl.float32)
        for tile in range(0, tiles):
            dgamma += tl.load(gamma_shares_ptr + tile * out_features + offs, mask=active, other=0.0)
        if HAS_BIAS:
            dgamma += dbias * tl.load(bias_ptr + offs, mask=active, other=0.0).to(tl.float32)
            dbias *= tl.load(gamma_ptr + offs, mask=active, other=0.0).to(tl.float32)
        tl.store(dgamma_ptr + offs, dgamma.to(dgamma_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        tl.store(dbias_ptr + group * largest + offs, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


FINISH_BLOCKS = (32, 128)  # output and input features of a tile of `_linear_wgrad_finish_kernel`
SHARE_ROWS, SHARE_BLOCK = 32, 128  # rows and columns of dy that `_linear_bias_shares_kernel` loads at a time
MIN_SHARE_ROWS, SHARE_PROGRAMS = 512, 16  # rows of a share at least, and programs for each processor
VECTOR_BLOCK = 256
MIN_SPLIT_ROWS = 1024  # of a wgrad: below, writing the shares costs more than idle processors


class _Wgrad(NamedTuple):
    """How a wgrad is divided: launch settings, reductions over rows, tiles of input features."""

    config: GemmConfig
    splits: int
    tiles_k: int


def _wgrad_plan(dy: Tensor, weight: Tensor) -> _Wgrad:
    groups, out, width = weight.shape
    config = config_for("wgrad", dy, width, out)
    tiles_k = triton.cdiv(width, config.block_n)
    tiles = groups * triton.cdiv(out, config.block_m) * tiles_k
    most = triton.cdiv(dy.shape[0], config.block_k if dy.device.type == "cpu" else MIN_SPLIT_ROWS)
    return _Wgrad(config, max(min(processors(dy.device) // tiles, most), 1), tiles_k)


def _bias_shares(dy: Tensor, groups: int, out: int) -> Tensor:
    """Sums of the columns of dy over shares of its rows, fp32 `[shares, groups, n]`."""
    rows, blocks = dy.shape[0], triton.cdiv(out, SHARE_BLOCK)
    most = triton.cdiv(rows, SHARE_ROWS if dy.device.type == "cpu" else MIN_SHARE_ROWS)
    count = max(min(SHARE_PROGRAMS * processors(dy.device) // (groups * blocks), most), 1)
    shares = torch.empty(count, groups, out, dtype=torch.float32, device=dy.device)
    _linear_bias_shares_kernel[(blocks, count, groups)](
        dy, shares,
        rows, triton.cdiv(rows, count), out,
        dy.stride(0), dy.stride(1) if groups > 1 else 0,
        ROWS=SHARE_ROWS, BLOCK=SHARE_BLOCK,
    )  # fmt: skip
    return shares


def _wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    into: Tensor,
    *,
    bias_grad: bool,
    out_max: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Write the weight's gradient `into` a corner `[groups, n, k]`; return full db and dgamma."""
    rows, (groups, out, width) = dy.shape[0], weight.shape
    config, splits, tiles_k = _wgrad_plan(dy, weight)
    fp32, device = torch.float32, dy.device
    bias_shares = _bias_shares(dy, groups, out) if bias_grad else None
    apart = splits > 1 or gamma is not None  # LayerScale's gradient reads P with the weight: one small pass
    partial = torch.empty(splits, groups, out, width, dtype=fp32, device=device) if apart else None
    _linear_wgrad_kernel[(triton.cdiv(out, config.block_m) * tiles_k, groups, splits)](
        dy, x, into, partial,
        rows, triton.cdiv(rows, splits), out, width,
        dy.stride(0), dy.stride(1) if groups > 1 else 0, x.stride(0), into.stride(0), into.stride(1),
        scale,
        APART=apart, PRECISION=precision(dy), **launch_options(config),
    )  # fmt: skip
    shares = 0 if gamma is None else triton.cdiv(width, FINISH_BLOCKS[1])
    gamma_shares = torch.empty(shares, out, dtype=fp32, device=device)
    if apart:
        grid = (triton.cdiv(width, FINISH_BLOCKS[1]), triton.cdiv(out, FINISH_BLOCKS[0]), groups)
        _linear_wgrad_finish_kernel[grid](
            partial, weight, gamma, into, gamma_shares,
            splits, out, width,
            into.stride(0), into.stride(1), *weight.stride(),
            HAS_GAMMA=gamma is not None,
            BLOCK_N=FINISH_BLOCKS[0], BLOCK_K=FINISH_BLOCKS[1],
        )  # fmt: skip
    dbias = torch.empty(groups * out_max if bias_grad else 0, dtype=dtype, device=dy.device)
    dgamma = torch.empty(out_max if gamma is not None else 0, dtype=dtype, device=dy.device)
    if bias_grad or gamma is not None:
        _linear_vector_grads_kernel[(triton.cdiv(out_max, VECTOR_BLOCK), groups)](
            bias_shares, gamma_shares, bias, gamma, dbias, dgamma,
            1 if bias_shares is None else len(bias_shares), shares, out, out_max,
            HAS_BIAS=bias_grad, HAS_GAMMA=gamma is not None, BLOCK=VECTOR_BLOCK,
        )  # fmt: skip
    return dbias, dgamma


def linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    full: list[int],
    dtype: torch.dtype,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and LayerScale in the shape of the largest network, zero outside the corner.

    Args:
        dy: `[rows, n]` or `[rows, groups, n]`.
        x: `[rows, k]`.
        weight, bias, gamma: corners `[groups, n, k]`, `[1, n]`, `[n]` of which the product was made; `bias`
            is read only together with `gamma`.
        scale: of the product.
        full: `[n_max, k_max]` of a group.
        dtype: of the gradients.
        bias_grad: whether there is a bias.

    Returns:
        `[groups * n_max, k_max]`, `[groups * n_max]` or empty, `[n_max]` or empty.
    """
    groups, out, width = weight.shape
    create = torch.empty if [out, width] == full else torch.zeros
    dweight = create(groups, *full, dtype=dtype, device=dy.device)
    dbias, dgamma = _wgrad(
        dy, x, weight, bias, gamma, scale, dweight[:, :out, :width],
        bias_grad=bias_grad, out_max=full[0], dtype=dtype,
    )  # fmt: skip
    return dweight.flatten(0, 1), dbias, dgamma


def linear_wgrad_corner(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    full: list[int],
    dtype: torch.dtype,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_wgrad`, but the weight's gradient is the corner alone, `[groups, n, k]`."""
    corner = torch.empty(weight.shape, dtype=dtype, device=dy.device)
    vectors = _wgrad(
        dy, x, weight, bias, gamma, scale, corner, bias_grad=bias_grad, out_max=full[0], dtype=dtype
    )
    return corner, *vectors


def _fake_vectors(
    dy: Tensor, weight: Tensor, gamma: Tensor | None, full: list[int], dtype: torch.dtype, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """Shapes of db and dgamma."""
    return (
        dy.new_empty(weight.shape[0] * full[0] if bias_grad else 0, dtype=dtype),
        dy.new_empty(0 if gamma is None else full[0], dtype=dtype),
    )


_ARGUMENTS = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, float scale, int[] full,"
    " ScalarType dtype, bool bias_grad) -> (Tensor, Tensor, Tensor)"
)
register(
    f"linear_wgrad{_ARGUMENTS}",
    linear_wgrad,
    lambda dy, x, weight, bias, gamma, scale, full, dtype, bias_grad: (
        dy.new_empty(weight.shape[0] * full[0], full[1], dtype=dtype),
        *_fake_vectors(dy, weight, gamma, full, dtype, bias_grad),
    ),
)
register(
    f"linear_wgrad_corner{_ARGUMENTS}",
    linear_wgrad_corner,
    lambda dy, x, weight, bias, gamma, scale, full, dtype, bias_grad: (
        dy.new_empty(weight.shape, dtype=dtype),
        *_fake_vectors(dy, weight, gamma, full, dtype, bias_grad),
    ),
)
