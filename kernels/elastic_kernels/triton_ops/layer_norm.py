"""Triton kernels of LayerNorm and RMSNorm over the active width, with an optional gather of rows before it.

    xhat = (x - mean) * rstd,  y = xhat * weight[:w] + bias[:w]
    g = dy * weight,  dx = rstd * (g - mean_k(g) - xhat * mean_k(g * xhat)) + dsum
    dw = sum dy * xhat,  db = sum dy

RMSNorm is the norm that has a weight and no bias: without `mean`, `bias` and `mean_k(g)`. Rows may have
widths of their own: then they are as long as the widest, and 0 beyond theirs.

Fused: the gather of the rows that take part (stochastic depth), statistics, affine, and in the backward the
addition of the gradient that bypasses the norm, and its rows that the branch before in the stream takes,
scaled and rounded for products. The backward is one pass over rows; each program keeps its partial affine
gradients in registers, and the partial sums are added in a fixed order.

Saved for backward: x, and fp32 mean and rstd of each row; or, of a norm in a residual stream, instead of x
and mean the normalised rows xhat, so that x may be overwritten and only rows that take part are kept. Bytes:
forward reads and writes rows * w elements, and writes xhat; backward reads twice and writes once that much;
the partial sums add programs * w * 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.layouts import places_of
from elastic_kernels.triton_ops.device import capability, cdiv, processors, unit_stride
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import first_order, ops, register
from elastic_kernels.triton_ops.vector_grads import affine_gradients
from elastic_kernels.tuning import Tunable

PROGRAMS_PER_SM = 4  # of the backward: enough loads in flight, few partial sums


@triton.jit
def _within(mask, widths_ptr, rows, mask_r, offs_k, width):
    """How many channels rows have, and which elements of a tile are among these."""
    count = width
    if widths_ptr is not None:
        count = tl.minimum(tl.load(widths_ptr + rows, mask=mask_r, other=1), width).to(tl.int32)
        mask = mask & (offs_k[None, :] < count[:, None])
    return count, mask


@triton.jit
def _place(places_ptr, token, mask_t):
    """The rows of tokens, and which have one: all, or those with a place >= 0."""
    place, mask_r = token.to(tl.int64), mask_t
    if places_ptr is not None:
        place = tl.load(places_ptr + token, mask=mask_t, other=-1).to(tl.int64)
        mask_r = place >= 0
    return place, mask_r


@launched("rows")
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, index_ptr, widths_ptr, y_ptr, xhat_ptr, mean_ptr, rstd_ptr,
    rows, width,
    stride_x,
    eps,
    HAS_AFFINE: tl.constexpr, KEEP_XHAT: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, BLOCK)
    mask_r, mask_k = offs_r < rows, offs_k < width
    mask = mask_r[:, None] & mask_k[None, :]
    place = offs_r.to(tl.int64)
    source = place
    if index_ptr is not None:
        source = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
    out = place[:, None] * width + offs_k[None, :]
    count, within = _within(mask, widths_ptr, offs_r, mask_r, offs_k, width)
    x = tl.load(x_ptr + source[:, None] * stride_x + offs_k[None, :], mask=within, other=0.0).to(tl.float32)
    centred = x
    if CENTRED:
        mean = tl.sum(x, 1) / count
        centred = tl.where(within, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / count + eps)
    xhat = centred * rstd[:, None]
    y = xhat
    if HAS_AFFINE:
        weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        y = xhat * weight[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        if widths_ptr is not None:
            y = tl.where(within, y, 0.0)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    if KEEP_XHAT:
        tl.store(xhat_ptr + out, xhat.to(xhat_ptr.dtype.element_ty), mask=mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)
        if CENTRED:
            tl.store(mean_ptr + offs_r, mean, mask=mask_r)


@launched("tokens")
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, xhat_ptr, weight_ptr, places_ptr, widths_ptr, mean_ptr, rstd_ptr, dsum_ptr,
    dx_ptr, partials_ptr, branch_ptr, branch_sums_ptr, branch_places_ptr, branch_scale_ptr,
    tokens, width,
    stride_x, stride_s,
    HAS_AFFINE: tl.constexpr, IN_STREAM: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """By tokens: `places` holds the row of each token among the normalised ones, or -1.

    So does `branch_places` among those of the branch, which get their share of dx.
    """
    CENTRED: tl.constexpr = IN_STREAM or mean_ptr is not None
    program, programs = tl.program_id(0), tl.num_programs(0)
    offs_k = tl.arange(0, BLOCK)
    mask_k = offs_k < width
    dweight, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    branch_sums = tl.zeros([BLOCK], tl.float32)
    if HAS_AFFINE:
        weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    for start in tl.range(program * ROWS, tokens, programs * ROWS, num_stages=2 if AHEAD else 1):
        offs_t = start + tl.arange(0, ROWS)
        mask_t = offs_t < tokens
        every = mask_t[:, None] & mask_k[None, :]
        token = offs_t.to(tl.int64)
        place, mask_r = _place(places_ptr, offs_t, mask_t)
        count, mask = _within(mask_r[:, None] & mask_k[None, :], widths_ptr, offs_t, mask_t, offs_k, width)
        dy = tl.load(dy_ptr + place[:, None] * width + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + place, mask=mask_r, other=0.0)
        if IN_STREAM:
            xhat = tl.load(xhat_ptr + place[:, None] * width + offs_k[None, :], mask=mask, other=0.0)
            xhat = xhat.to(tl.float32)
        else:
            x = tl.load(x_ptr + token[:, None] * stride_x + offs_k[None, :], mask=mask, other=0.0)
            xhat = x.to(tl.float32)
            if CENTRED:
                xhat -= tl.load(mean_ptr + place, mask=mask_r, other=0.0)[:, None]
            xhat = tl.where(mask, xhat * rstd[:, None], 0.0)
        g = dy
        if HAS_AFFINE:
            dweight += tl.sum(dy * xhat, 0)
            dbias += tl.sum(dy, 0)
            g = dy * weight[None, :]
        along = tl.sum(g * xhat, 1) / count
        if CENTRED:
            g -= (tl.sum(g, 1) / count)[:, None]
        dx = (g - xhat * along[:, None]) * rstd[:, None]
        if widths_ptr is not None:
            dx = tl.where(mask, dx, 0.0)
        if IN_STREAM:
            dsum_ptrs = dsum_ptr + token[:, None] * stride_s + offs_k[None, :]
            dx += tl.load(dsum_ptrs, mask=every, other=0.0).to(tl.float32)
        out = dx_ptr + token[:, None] * width + offs_k[None, :]
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(out, dx, mask=every)
        if branch_ptr is not None:
            place, mask_r = _place(branch_places_ptr, offs_t, mask_t)
            mask = mask_r[:, None] & mask_k[None, :]
            branch = tl.where(mask, dx.to(tl.float32), 0.0)
            if branch_scale_ptr is not None:
                branch *= tl.load(branch_scale_ptr + place, mask=mask_r, other=0.0)[:, None]
            out = branch_ptr + place[:, None] * width + offs_k[None, :]
            tl.store(out, branch.to(branch_ptr.dtype.element_ty), mask=mask)
            branch_sums += tl.sum(branch, 0)
    if branch_sums_ptr is not None:
        tl.store(branch_sums_ptr + program * width + offs_k, branch_sums, mask=mask_k)
    if HAS_AFFINE:
        partial = partials_ptr + program.to(tl.int64) * 2 * width + offs_k
        tl.store(partial, dweight, mask=mask_k)
        tl.store(partial + width, dbias, mask=mask_k)


@dataclass(frozen=True)
class RowConfig:
    """Launch settings for rows up to a width: `rows` rows of `block` channels a tile."""

    block: int
    rows: int
    warps: int


# A thread holds 16 values, so that four blocks of the backward fit on a multiprocessor; not timed on a GPU
# yet.
CONFIGS = (
    RowConfig(block=128, rows=8, warps=2),
    RowConfig(block=512, rows=4, warps=4),
    RowConfig(block=1024, rows=2, warps=4),
    RowConfig(block=2048, rows=2, warps=8),
    RowConfig(block=4096, rows=1, warps=8),
)


def row_config(width: int) -> RowConfig:
    return next(config for config in CONFIGS if width <= config.block)


def _candidates(block: int) -> list[RowConfig]:
    """Of threads that hold 8, 16 or 32 values."""
    tiles = ((warps, values * 32 * warps) for warps in (2, 4, 8) for values in (8, 16, 32))
    return [RowConfig(block, size // block, warps) for warps, size in tiles if size >= block]


_FWD, _BWD = (Tunable(f"layer_norm_{way}", _candidates) for way in ("fwd", "bwd"))


def _config(tunable: Tunable, x: Tensor) -> RowConfig:
    fallback = row_config(x.shape[1])
    return tunable.choose(x, (fallback.block,), fallback)


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    index: Tensor | None,
    dtype: torch.dtype,
    keep_xhat: bool = False,
    widths: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise rows.

    Args:
        x: `[tokens, w]`.
        weight, bias, eps, index: as above; a weight without a bias is that of RMSNorm.
        dtype: of y.
        keep_xhat: also give the rows before the affine.
        widths: int64 `[tokens]`, of each row, without an index.
        keep: also give the statistics.

    Returns:
        y `[rows, w]`, xhat in the dtype of y or empty, fp32 mean (empty for RMSNorm) and rstd `[rows]`, empty
        if not kept.
    """
    centred = _is_centred(weight, bias)
    results = _empty_results(x, index, dtype, centred, keep_xhat, keep)
    y, xhat, *statistics = results
    rows, width = y.shape
    if rows:
        config = _config(_FWD, x)
        _layer_norm_fwd_kernel[(cdiv(rows, config.rows),)](
            x, weight, bias, index, widths, y, xhat, *(statistics if keep else (None, None)),
            rows, width,
            x.stride(0),
            eps,
            HAS_AFFINE=weight is not None, KEEP_XHAT=keep_xhat, CENTRED=centred,
            ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return results


def _is_centred(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether these are of a LayerNorm, which takes off the mean, and not of an RMSNorm."""
    return weight is None or bias is not None


def _empty_results(
    x: Tensor, index: Tensor | None, dtype: torch.dtype, centred: bool, keep_xhat: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (x if index is None else index).shape[0]
    y = x.new_empty(rows, x.shape[1], dtype=dtype)
    mean = x.new_empty(rows if keep and centred else 0, dtype=torch.float32)
    xhat = torch.empty_like(y) if keep_xhat else y.new_empty(0)
    return y, xhat, mean, x.new_empty(rows if keep else 0, dtype=torch.float32)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor | None,
    xhat: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    places: Tensor | None,
    dsum: Tensor | None,
    branch: Tensor | None = None,
    branch_sums: Tensor | None = None,
    branch_places: Tensor | None = None,
    branch_scale: Tensor | None = None,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and partial sums fp32 `[parts, 2, w]` for those of weight and bias, 0 wide without them.

    `dy` `[rows, w]` is contiguous. Either `x` and `mean` (but for RMSNorm) are given, or, in a residual
    stream, `xhat`, contiguous, and `dsum` `[tokens, w]`, rows of any stride, of the dtype of x: added to its
    gradient.

    With `branch` `[kept, w]`, made by `branch_room`, rows of the gradient of x go there, too: those with a
    place in `branch_places` `[tokens]`, or all, times their `branch_scale` fp32 `[kept]`. Partial sums over
    them go to `branch_sums`.
    """
    like = _like(x, dsum)
    tokens, width = like.shape
    dx = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    partials = _partials(like, weight)
    config = _config(_BWD, like)
    # Elsewhere fewer blocks would fit than there are programs, and fp32 spills.
    ahead = capability(dy.device) == (9, 0) and dy.dtype.itemsize == 2
    _layer_norm_bwd_kernel[(partials.shape[0],)](
        dy, x, xhat, weight, places, widths, mean, rstd, dsum,
        dx, partials, branch, branch_sums, branch_places, branch_scale,
        tokens, width,
        0 if x is None else x.stride(0), 0 if dsum is None else dsum.stride(0),
        HAS_AFFINE=weight is not None, IN_STREAM=xhat is not None, AHEAD=ahead,
        ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    return dx, partials


def _partials(like: Tensor, weight: Tensor | None) -> Tensor:
    """Room for the affine's, of each program."""
    width = 0 if weight is None else like.shape[1]
    return like.new_empty(_programs(like), 2, width, dtype=torch.float32)


def _programs(like: Tensor) -> int:
    return PROGRAMS_PER_SM * processors(like.device)


def branch_room(
    like: Tensor, rows: int, dtype: torch.dtype, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Where a backward of such a stream puts rows of a branch, and sums of them fp32 `[parts, 1, w]`."""
    width = like.shape[1]
    sums = like.new_empty(_programs(like), 1, width, dtype=torch.float32) if wants_sums else None
    return like.new_empty(rows, width, dtype=dtype), sums


def _like(x: Tensor | None, dsum: Tensor | None) -> Tensor:
    like = dsum if x is None else x
    assert like is not None
    return like


register(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? index,"
    " ScalarType dtype, bool keep_xhat=False, Tensor? widths=None, bool keep=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    layer_norm_fwd,
    lambda x, weight, bias, eps, index, dtype, keep_xhat=False, widths=None, keep=True: _empty_results(
        x, index, dtype, _is_centred(weight, bias), keep_xhat, keep
    ),
)
register(
    "layer_norm_bwd(Tensor dy, Tensor? x, Tensor? xhat, Tensor? weight, Tensor? mean, Tensor rstd,"
    " Tensor? places, Tensor? dsum, Tensor(a!)? branch=None, Tensor(b!)? branch_sums=None,"
    " Tensor? branch_places=None, Tensor? branch_scale=None, Tensor? widths=None) -> (Tensor, Tensor)",
    layer_norm_bwd,
    lambda dy, x, xhat, weight, mean, rstd, places, dsum, *branch: (
        _like(x, dsum).new_empty(_like(x, dsum).shape),
        _partials(_like(x, dsum), weight),
    ),
)


class LayerNormFunction(torch.autograd.Function):
    """LayerNorm or RMSNorm with its gradients; outside of the registered operators, which saves host time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        index: Tensor | None,
        widths: Tensor | None,
        trains: bool,
    ) -> Tensor:
        x = unit_stride(x)
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
        widths = None if widths is None else widths.contiguous()
        keep = trains and any(ctx.needs_input_grad)
        y, _, mean, rstd = ops.layer_norm_fwd(x, weight, bias, eps, index, dtype, False, widths, keep)
        ctx.save_for_backward(x, weight, mean if _is_centred(weight, bias) else None, rstd, index, widths)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, index, widths = ctx.saved_tensors
        places = None if index is None else places_of(index, len(x))
        rest = (None, None, None, None, None, widths)
        dx, partials = ops.layer_norm_bwd(dy.contiguous(), x, None, weight, mean, rstd, places, *rest)
        dweight, dbias = (None, None) if weight is None else affine_gradients(partials, weight)
        return dx, dweight, dbias if ctx.has_bias else None, None, None, None, None
