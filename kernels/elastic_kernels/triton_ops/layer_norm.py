"""Triton kernels of LayerNorm over the active width, with an optional gather of rows.

    xhat = (x - mean) * rstd,  y = xhat * weight[:w] + bias[:w]
    g = dy * weight,  dx = rstd * (g - mean_k(g) - xhat * mean_k(g * xhat)),  dw = sum dy * xhat,  db = sum dy

Fused: the gather of the rows that take part (stochastic depth), statistics, affine. The backward is one pass
over rows; each program keeps its share of the affine gradients in registers, and the shares are summed in a
fixed order.

Saved for backward: x, and fp32 mean and rstd of each row. Bytes: forward reads and writes rows * w elements;
backward reads twice and writes once that much; the shares add programs * w * 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_PROGRAMS = 4  # of the backward, under the interpreter
PROGRAMS_PER_SM = 4  # of the backward: enough loads in flight, few shares to sum


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, index_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, width,
    stride_x,
    eps,
    HAS_AFFINE: tl.constexpr, HAS_INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, BLOCK)
    mask_r, mask_k = offs_r < rows, offs_k < width
    mask = mask_r[:, None] & mask_k[None, :]
    source = offs_r.to(tl.int64)
    if HAS_INDEX:
        source = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
    x = tl.load(x_ptr + source[:, None] * stride_x + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    y = centred * rstd[:, None]
    if HAS_AFFINE:
        weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        y = y * weight[None, :] + bias[None, :]
    out = y_ptr + offs_r.to(tl.int64)[:, None] * width + offs_k[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_r, mean, mask=mask_r)
    tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, index_ptr, mean_ptr, rstd_ptr, dx_ptr, shares_ptr,
    rows, width,
    stride_x,
    HAS_AFFINE: tl.constexpr, HAS_INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    offs_k = tl.arange(0, BLOCK)
    mask_k = offs_k < width
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    if HAS_AFFINE:
        weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        offs_r = start + tl.arange(0, ROWS)
        mask_r = offs_r < rows
        mask = mask_r[:, None] & mask_k[None, :]
        place = offs_r.to(tl.int64)
        source = place
        if HAS_INDEX:
            source = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
        dy = tl.load(dy_ptr + place[:, None] * width + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + source[:, None] * stride_x + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_r, mask=mask_r, other=0.0)
        rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        g = dy
        if HAS_AFFINE:
            dweight += tl.sum(dy * xhat, 0)
            dbias += tl.sum(dy, 0)
            g = dy * weight[None, :]
        along = tl.sum(g * xhat, 1) / width
        dx = (g - (tl.sum(g, 1) / width)[:, None] - xhat * along[:, None]) * rstd[:, None]
        out = dx_ptr + source[:, None] * width + offs_k[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_AFFINE:
        share = shares_ptr + program.to(tl.int64) * 2 * width + offs_k
        tl.store(share, dweight, mask=mask_k)
        tl.store(share + width, dbias, mask=mask_k)


@dataclass(frozen=True)
class RowConfig:
    """Launch settings for rows up to a width: `rows` rows of `block` channels a tile."""

    block: int
    rows: int
    warps: int


# A thread holds 16 to 32 values, in 16-byte accesses; not timed on a GPU yet.
CONFIGS = (
    RowConfig(block=128, rows=8, warps=2),
    RowConfig(block=512, rows=4, warps=4),
    RowConfig(block=1024, rows=4, warps=4),
    RowConfig(block=2048, rows=2, warps=4),
    RowConfig(block=4096, rows=1, warps=8),
)


def row_config(width: int) -> RowConfig:
    """Settings of both kernels."""
    return next(config for config in CONFIGS if width <= config.block)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`x` `[tokens, w]` -> y `[rows, w]`, fp32 mean and rstd `[rows]`; weight and bias both or neither."""
    rows, width = (x if index is None else index).shape[0], x.shape[1]
    y = torch.empty(rows, width, dtype=_result_dtype(x, weight), device=x.device)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        config = row_config(width)
        _layer_norm_fwd_kernel[(triton.cdiv(rows, config.rows),)](
            x, weight, bias, index, y, mean, rstd,
            rows, width,
            x.stride(0),
            eps,
            HAS_AFFINE=weight is not None, HAS_INDEX=index is not None,
            ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in full shape (empty without them); `dy` is contiguous."""
    rows, width = dy.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if index is not None or not rows:
        dx.zero_()
    programs = _programs(x.device, rows)
    affine = 0 if weight is None else width
    shares = torch.empty(programs, 2, affine, dtype=torch.float32, device=x.device)
    if rows:
        config = row_config(width)
        _layer_norm_bwd_kernel[(programs,)](
            dy, x, weight, index, mean, rstd, dx, shares,
            rows, width,
            x.stride(0),
            HAS_AFFINE=weight is not None, HAS_INDEX=index is not None,
            ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return dx, *_affine_gradients(shares if rows else shares[:0], weight)


def _affine_gradients(shares: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum the programs' shares into full-shape gradients that are zero outside of the active width."""
    if weight is None:
        return shares.new_empty(0), shares.new_empty(0)
    full = shares.new_zeros(2, weight.shape[0])
    full[:, : shares.shape[2]] = shares.sum(0)
    dweight, dbias = full.to(weight.dtype).unbind(0)
    return dweight, dbias.clone()  # an operator may not return views of one tensor


def _programs(device: torch.device, rows: int) -> int:
    if device.type != "cuda":
        return CPU_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _result_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


_library = torch.library.Library("elastic_kernels", "FRAGMENT")
_library.define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? index)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? index)"
    " -> (Tensor, Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):  # on a CPU under Triton's interpreter
    _library.impl("layer_norm_fwd", layer_norm_fwd, _device)
    _library.impl("layer_norm_bwd", layer_norm_bwd, _device)


@torch.library.register_fake("elastic_kernels::layer_norm_fwd", lib=_library)
def _layer_norm_fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (x if index is None else index).shape[0]
    statistic = x.new_empty(rows, dtype=torch.float32)
    y = x.new_empty(rows, x.shape[1], dtype=_result_dtype(x, weight))
    return y, statistic, torch.empty_like(statistic)


@torch.library.register_fake("elastic_kernels::layer_norm_bwd", lib=_library)
def _layer_norm_bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    affine = mean.new_empty(0) if weight is None else torch.empty_like(weight)
    return x.new_empty(x.shape), affine, torch.empty_like(affine)


class ElasticLayerNorm(torch.autograd.Function):
    """LayerNorm with its gradients; outside of the registered operators, which saves host time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        index: Tensor | None,
    ) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        y, mean, rstd = torch.ops.elastic_kernels.layer_norm_fwd(x, weight, bias, eps, index)
        ctx.save_for_backward(x, weight, mean, rstd, index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, index = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.elastic_kernels.layer_norm_bwd(
            dy.contiguous(), x, weight, mean, rstd, index
        )
        affine = (None, None) if weight is None else (dweight, dbias)
        return dx, *affine, None, None
