"""Triton kernels of group norm on channels-last maps, with the residual addition and ReLU after it.

    xhat = (x - mean) * rstd,  y = act(xhat * weight[:C] + bias[:C] + residual)
    d = dy * (y > 0),  dw = sum d * xhat,  db = sum d,  dresidual = d
    dx = rstd * (w * d - mean_g(w * d) - xhat * mean_g(w * d * xhat))

A program owns a sample and some whole groups, about 64 neighbouring channels, and goes over the positions of
the map twice: for the sums, then for the result; the second time they come from the cache. The sums of a
group follow from those of its channels, which are also the sample's share of the affine gradients.

Saved for backward: x, y where there is a ReLU, and fp32 mean and rstd of each group. Bytes: forward reads x
(and the residual) and writes y; backward reads dy, x and y and writes dx (and dresidual).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv, next_power_of_2
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import first_order, ops, register
from elastic_kernels.triton_ops.vector_grads import affine_gradients
from elastic_kernels.tuning import Tunable, power_of_2


@triton.jit
def _over_group(values, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr):
    """Each channel's value becomes the sum over its group: `[GROUPS * PER_GROUP]` -> the same."""
    sums = tl.sum(tl.reshape(values, [GROUPS, PER_GROUP]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [GROUPS, PER_GROUP]), [GROUPS * PER_GROUP])


@triton.jit
def _columns(groups, per_group, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr):
    """Group and channel of each column of a program's tile, and which columns there are."""
    column = tl.arange(0, GROUPS * PER_GROUP)
    group, within = tl.program_id(1) * GROUPS + column // PER_GROUP, column % PER_GROUP
    return group, group * per_group + within, (group < groups) & (within < per_group)


@triton.jit
def _tile(start, rows, channels, first, mask_c, ROWS: tl.constexpr):
    """Addresses of a sample's positions from `start`, and which of them there are."""
    offs_r = start + tl.arange(0, ROWS)
    mask = (offs_r < rows)[:, None] & mask_c[None, :]
    return offs_r.to(tl.int64)[:, None] * channels + first[None, :], mask


@launched("rows")
def _group_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, groups, per_group,
    eps,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    sample, channels = tl.program_id(0).to(tl.int64), groups * per_group
    group, channel, mask_c = _columns(groups, per_group, GROUPS, PER_GROUP)
    first = sample * rows * channels + channel
    # Mean and squared deviations of each channel, merged tile by tile (Chan et al., 1983).
    mean = tl.zeros([GROUPS * PER_GROUP], tl.float32)
    squares = tl.zeros([GROUPS * PER_GROUP], tl.float32)
    for start in range(0, rows, ROWS):
        place, mask = _tile(start, rows, channels, first, mask_c, ROWS)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(rows - start, ROWS) * 1.0
        tile_mean = tl.sum(x, 0) / count
        centred = tl.where(mask, x - tile_mean[None, :], 0.0)
        delta, seen = tile_mean - mean, start + count
        mean += delta * (count / seen)
        squares += tl.sum(centred * centred, 0) + delta * delta * (start * (count / seen))
    size = rows * per_group * 1.0
    centre = _over_group(tl.where(mask_c, mean, 0.0), GROUPS, PER_GROUP) / per_group
    apart = tl.where(mask_c, mean - centre, 0.0)
    squares = tl.where(mask_c, squares, 0.0) + rows * apart * apart
    rstd = 1 / tl.sqrt(_over_group(squares, GROUPS, PER_GROUP) / size + eps)
    if rstd_ptr is not None:
        stats = sample * groups + group
        leads = mask_c & (channel == group * per_group)
        tl.store(mean_ptr + stats, centre, mask=leads)
        tl.store(rstd_ptr + stats, rstd, mask=leads)
    weight = tl.load(weight_ptr + channel, mask=mask_c, other=0.0).to(tl.float32) * rstd
    bias = tl.load(bias_ptr + channel, mask=mask_c, other=0.0).to(tl.float32)
    for start in range(0, rows, ROWS):
        place, mask = _tile(start, rows, channels, first, mask_c, ROWS)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        y = (x - centre[None, :]) * weight[None, :] + bias[None, :]
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y > 0, y, tl.where(y == y, 0.0, y))  # NaN stays NaN
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@launched("rows")
def _group_norm_bwd_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    rows, groups, per_group,
    RELU: tl.constexpr, KEEP_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    sample, channels = tl.program_id(0).to(tl.int64), groups * per_group
    group, channel, mask_c = _columns(groups, per_group, GROUPS, PER_GROUP)
    first = sample * rows * channels + channel
    stats = sample * groups + group
    mean = tl.load(mean_ptr + stats, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + stats, mask=mask_c, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=mask_c, other=0.0).to(tl.float32)
    dweight = tl.zeros([GROUPS * PER_GROUP], tl.float32)
    dbias = tl.zeros([GROUPS * PER_GROUP], tl.float32)
    for start in range(0, rows, ROWS):
        place, mask = _tile(start, rows, channels, first, mask_c, ROWS)
        d = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            d = tl.where(tl.load(y_ptr + place, mask=mask, other=0.0) > 0, d, 0.0)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dweight += tl.sum(d * (x - mean[None, :]) * rstd[None, :], 0)
        dbias += tl.sum(d, 0)
    partial = partials_ptr + sample * 2 * channels + channel
    tl.store(partial, dweight, mask=mask_c)
    tl.store(partial + channels, dbias, mask=mask_c)
    size = rows * per_group * 1.0
    along = _over_group(weight * dweight, GROUPS, PER_GROUP) / size
    level = _over_group(weight * dbias, GROUPS, PER_GROUP) / size
    for start in range(0, rows, ROWS):
        place, mask = _tile(start, rows, channels, first, mask_c, ROWS)
        d = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            d = tl.where(tl.load(y_ptr + place, mask=mask, other=0.0) > 0, d, 0.0)
        if KEEP_RESIDUAL:
            tl.store(dresidual_ptr + place, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * rstd[None, :]
        dx = rstd[None, :] * (weight[None, :] * d - level[None, :] - xhat * along[None, :])
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class GroupConfig:
    """Tiles of `rows` positions by `groups` groups of up to `per_group` channels (a power of 2)."""

    rows: int
    groups: int
    per_group: int
    warps: int = 4


TILE_CHANNELS, TILE_VALUES = 64, 2048  # 128 bytes in half precision; 16 values a thread; not timed on a GPU


def group_config(groups: int, per_group: int) -> GroupConfig:
    wide = next_power_of_2(per_group)
    together = min(max(TILE_CHANNELS // wide, 1), next_power_of_2(groups))
    return GroupConfig(max(TILE_VALUES // (wide * together), 1), together, wide)


def _candidates(rows: int, groups: int, per_group: int) -> list[GroupConfig]:
    """Tiles of the fallback's channels, of threads that hold 8, 16 or 32 values."""
    channels = group_config(groups, per_group)
    return [
        replace(channels, rows=max(values * 32 * warps // (channels.groups * per_group), 1), warps=warps)
        for warps in (2, 4, 8)
        for values in (8, 16, 32)
    ]


_FWD, _BWD = (Tunable(f"group_norm_{way}", _candidates) for way in ("fwd", "bwd"))


def _config(tunable: Tunable, x: Tensor, groups: int) -> GroupConfig:
    fallback = group_config(groups, x.shape[2] // groups)
    return tunable.choose(x, (power_of_2(x.shape[1]), power_of_2(groups), fallback.per_group), fallback)


def group_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`[N, rows, C]`, contiguous as `residual` -> y of the same layout, fp32 mean and rstd `[N, groups]`.

    Statistics that are not kept are empty.
    """
    samples, rows, channels = x.shape
    y, *statistics = results = _empty_results(x, groups, keep)
    if x.numel():
        config = _config(_FWD, x, groups)
        _group_norm_fwd_kernel[(samples, cdiv(groups, config.groups))](
            x, weight, bias, residual, y, *(statistics if keep else (None, None)),
            rows, groups, channels // groups,
            eps,
            HAS_RESIDUAL=residual is not None, RELU=relu,
            ROWS=config.rows, GROUPS=config.groups, PER_GROUP=config.per_group, num_warps=config.warps,
        )  # fmt: skip
    return results


def _empty_results(x: Tensor, groups: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0] if keep else 0, groups)
    mean, rstd = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean, rstd


def group_norm_bwd(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, keep_residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the residual (empty unless kept), and sums of samples for weight and bias.

    `dy` and `x` are `[N, rows, C]`, contiguous; `y` is the output of a ReLU, or None without one.
    """
    samples, rows, channels = x.shape
    groups = mean.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = torch.empty(x.shape if keep_residual else (0,), dtype=x.dtype, device=x.device)
    make = torch.empty if x.numel() else torch.zeros
    partials = make(samples, 2, channels, dtype=torch.float32, device=x.device)
    if x.numel():
        config = _config(_BWD, x, groups)
        _group_norm_bwd_kernel[(samples, cdiv(groups, config.groups))](
            dy, x, y, weight, mean, rstd, dx, dresidual, partials,
            rows, groups, channels // groups,
            RELU=y is not None, KEEP_RESIDUAL=keep_residual,
            ROWS=config.rows, GROUPS=config.groups, PER_GROUP=config.per_group, num_warps=config.warps,
        )  # fmt: skip
    return dx, dresidual, partials


register(
    "group_norm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int groups, float eps, bool relu,"
    " bool keep=True) -> (Tensor, Tensor, Tensor)",
    group_norm_fwd,
    lambda x, weight, bias, residual, groups, eps, relu, keep=True: _empty_results(x, groups, keep),
)
register(
    "group_norm_bwd(Tensor dy, Tensor x, Tensor? y, Tensor weight, Tensor mean, Tensor rstd,"
    " bool keep_residual) -> (Tensor, Tensor, Tensor)",
    group_norm_bwd,
    lambda dy, x, y, weight, mean, rstd, keep_residual: (
        torch.empty_like(x),
        torch.empty_like(x) if keep_residual else x.new_empty(0),
        x.new_empty(x.shape[0], 2, x.shape[2], dtype=torch.float32),
    ),
)


class GroupNormFunction(torch.autograd.Function):
    """Group norm with its gradients; outside of the registered operators, which saves host time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        groups: int,
        eps: float,
        relu: bool,
        trains: bool,
    ) -> Tensor:
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        keep = trains and any(ctx.needs_input_grad)
        y, mean, rstd = ops.group_norm_fwd(x, weight, bias, residual, groups, eps, relu, keep)
        ctx.save_for_backward(x, y if relu else None, weight, mean, rstd)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        gated = y is not None and ctx.has_residual  # without a ReLU the residual's gradient is dy
        dx, dresidual, partials = ops.group_norm_bwd(dy, x, y, weight, mean, rstd, gated)
        residual_grad = (dresidual if gated else dy) if ctx.has_residual else None
        return dx, *affine_gradients(partials, weight), residual_grad, None, None, None, None
