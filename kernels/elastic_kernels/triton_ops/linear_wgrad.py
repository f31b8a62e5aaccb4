"""Gradients of a linear layer's weight, bias and LayerScale.

    P[g] = s dy[g]^T x,  dW = gamma * P,  db = gamma * sum dy,  dgamma = rowsum(P * W) + b * sum dy

The product P is cuBLAS's, with fp32 results of half-precision operands. LayerScale takes one pass over it, of
the weight's size: dgamma needs no saved activation. Columns of dy are summed in parts, which are added in a
fixed order, so that results repeat bitwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv, processors
from elastic_kernels.triton_ops.gemm import product_into
from elastic_kernels.triton_ops.registration import register


@triton.jit(do_not_specialize=["rows", "part_rows"])
def _linear_bias_sums_kernel(
    dy_ptr, sums_ptr,
    rows, part_rows, out_features,
    stride_y, stride_yg,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK columns of dy of a group over a part of the rows."""
    part, group = tl.program_id(1), tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < out_features
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, rows)
    columns = dy_ptr + group * stride_yg + offs_n[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        offs_r = start + tl.arange(0, ROWS)
        mask = (offs_r < last)[:, None] & mask_n[None, :]
        dy = tl.load(columns + offs_r.to(tl.int64)[:, None] * stride_y, mask=mask, other=0.0)
        total += dy.to(tl.float32)
    place = (part * tl.num_programs(2) + group) * out_features
    tl.store(sums_ptr + place + offs_n, tl.sum(total, 0), mask=mask_n)


@triton.jit
def _added(sums_ptr, parts, stride, offs_n, mask_n, PARTS: tl.constexpr):
    """Columns `offs_n` of partial sums `[parts, stride]`, added up."""
    total = tl.zeros([PARTS, offs_n.shape[0]], tl.float32)
    for start in range(0, parts, PARTS):
        offs_p = start + tl.arange(0, PARTS)
        mask = (offs_p < parts)[:, None] & mask_n[None, :]
        total += tl.load(sums_ptr + offs_p[:, None] * stride + offs_n[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["parts"])
def _linear_bias_grad_kernel(
    sums_ptr, beside_ptr, dbias_ptr,
    parts, out_features, largest,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The full-shape gradient of a group's bias, 0 outside of the corner, and one beside it."""
    group = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums_ptr += group * out_features
    dbias = _added(sums_ptr, parts, tl.num_programs(1) * out_features, offs_n, offs_n < out_features, PARTS)
    inside, place = offs_n < largest, group * largest + offs_n
    if beside_ptr is not None:
        dbias += tl.load(beside_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dbias_ptr + place, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def _layer_scale_grads_kernel(
    p_ptr, sums_ptr, weight_ptr, bias_ptr, gamma_ptr, corner_ptr, beside_ptr, gamma_beside_ptr,
    dbias_ptr, dgamma_ptr,
    parts, out_features, in_features, largest, corner_out, corner_width,
    stride_wn, stride_wk,
    HAS_BIAS: tl.constexpr, HAS_CORNER: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make rows of P those of the weight's gradient, to which a corner may be added, in place."""
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_n, inside = offs_n < out_features, offs_n < largest
    gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    rows = offs_n.to(tl.int64)[:, None]
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, in_features, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        mask = mask_n[:, None] & (offs_k < in_features)[None, :]
        p = tl.load(p_ptr + rows * in_features + offs_k[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + rows * stride_wn + offs_k[None, :] * stride_wk, mask=mask, other=0.0)
        products += p * w.to(tl.float32)
        p *= gamma[:, None]
        if HAS_CORNER:
            shared = (offs_n < corner_out)[:, None] & (offs_k < corner_width)[None, :]
            corner = tl.load(corner_ptr + rows * corner_width + offs_k[None, :], mask=shared, other=0.0)
            p += corner.to(tl.float32)
        tl.store(p_ptr + rows * in_features + offs_k[None, :], p, mask=mask)
    dgamma = tl.sum(products, 1)
    if HAS_BIAS:
        dbias = _added(sums_ptr, parts, out_features, offs_n, mask_n, PARTS)
        dgamma += dbias * tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        dbias *= gamma
        if beside_ptr is not None:
            dbias += tl.load(beside_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
        tl.store(dbias_ptr + offs_n, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
    if gamma_beside_ptr is not None:
        dgamma += tl.load(gamma_beside_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(dgamma_ptr + offs_n, dgamma.to(dgamma_ptr.dtype.element_ty), mask=inside)


SUM_ROWS, SUM_BLOCK = 32, 128  # rows and columns of dy that `_linear_bias_sums_kernel` loads at a time
MIN_PART_ROWS, SUM_PROGRAMS = 512, 16  # rows of a part at least, and programs for each processor
PARTS, BIAS_BLOCK = 64, 32  # partial sums and columns that `_linear_bias_grad_kernel` loads at a time
SCALE_ROWS, SCALE_BLOCK = 4, 512  # of `_layer_scale_grads_kernel`: 16 values a thread


def _groups_of(dy: Tensor) -> tuple[int, int]:
    return (dy.shape[1] if dy.dim() == 3 else 1), dy.shape[-1]


def linear_wgrad(dy: Tensor, x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`dy` `[rows, (groups,) n]`, `x` `[rows, k]` -> P `[groups, n, k]`, of their dtype or fp32."""
    groups, out = _groups_of(dy)
    p = torch.empty(groups * out, x.shape[1], dtype=dtype, device=dy.device)
    product_into(p, dy.flatten(1).t(), x, scale=scale)
    return p.view(groups, out, x.shape[1])


def linear_wgrad_(total: Tensor, dy: Tensor, x: Tensor, scale: float) -> None:
    """Add P to a total `[groups, n, k]` of them."""
    product_into(total.flatten(0, 1), dy.flatten(1).t(), x, scale=scale, add=True)


def linear_bias_sums(dy: Tensor) -> Tensor:
    """`dy` `[rows, n]` or `[rows, groups, n]` -> sums over parts of its rows, fp32 `[parts, groups, n]`."""
    rows, (groups, out) = dy.shape[0], _groups_of(dy)
    blocks = cdiv(out, SUM_BLOCK)
    most = cdiv(rows, SUM_ROWS if dy.device.type == "cpu" else MIN_PART_ROWS)
    parts = max(min(SUM_PROGRAMS * processors(dy.device) // (groups * blocks), most), 1)
    sums = torch.empty(parts, groups, out, dtype=torch.float32, device=dy.device)
    _linear_bias_sums_kernel[(blocks, parts, groups)](
        dy, sums,
        rows, cdiv(rows, parts), out,
        dy.stride(0), dy.stride(1) if groups > 1 else 0,
        ROWS=SUM_ROWS, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    return sums


def linear_bias_grad(sums: Tensor, largest: int, dtype: torch.dtype, beside: Tensor | None) -> Tensor:
    """Partial sums fp32 `[parts, groups, n]`, added to the corners of `beside`, or of zeros.

    `[groups * largest]`, as is `beside`.
    """
    parts, groups, out = sums.shape
    dbias = torch.empty(groups * largest, dtype=dtype, device=sums.device)
    _linear_bias_grad_kernel[(cdiv(largest, BIAS_BLOCK), groups)](
        sums, beside, dbias,
        parts, out, largest,
        PARTS=PARTS, BLOCK=BIAS_BLOCK,
    )  # fmt: skip
    return dbias


def layer_scale_grads_(
    p: Tensor,
    sums: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    corner: Tensor | None,
    largest: int,
    dtype: torch.dtype,
    beside: Tensor | None,
    gamma_beside: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Turn P into the weight's gradient.

    Args:
        p: fp32 `[1, n, k]`, contiguous.
        sums: partial sums of the bias, fp32 `[parts, 1, n]`, or None without one.
        weight, bias, gamma: corners `[1, n, k]`, `[1, n]`, `[n]` of which the product was made.
        corner: `[1, n_c, k_c]`, contiguous, a gradient to be added to that corner, or None.
        largest: length of the vectors.
        dtype: of the vectors' gradients.
        beside, gamma_beside: gradients of bias and gamma to which these are added, or None.

    Returns:
        Gradients of bias and gamma `[largest]`; the former empty without a bias.
    """
    _, out, width = p.shape
    dbias, dgamma = (
        torch.empty(n, dtype=dtype, device=p.device) for n in (0 if sums is None else largest, largest)
    )
    corner_out, corner_width = (0, 0) if corner is None else corner.shape[1:]
    _layer_scale_grads_kernel[(cdiv(largest, SCALE_ROWS),)](
        p, sums, weight, bias, gamma, corner, beside, gamma_beside, dbias, dgamma,
        0 if sums is None else len(sums), out, width, largest, corner_out, corner_width,
        weight.stride(1), weight.stride(2),
        HAS_BIAS=sums is not None, HAS_CORNER=corner is not None,
        PARTS=PARTS, ROWS=SCALE_ROWS, BLOCK=SCALE_BLOCK,
    )  # fmt: skip
    return dbias, dgamma


register(
    "linear_wgrad(Tensor dy, Tensor x, float scale, ScalarType dtype) -> Tensor",
    linear_wgrad,
    lambda dy, x, scale, dtype: dy.new_empty(*_groups_of(dy), x.shape[1], dtype=dtype),
)
register(
    "linear_wgrad_(Tensor(a!) total, Tensor dy, Tensor x, float scale) -> ()",
    linear_wgrad_,
    lambda *arguments: None,
)
register(
    "linear_bias_sums(Tensor dy) -> Tensor",
    linear_bias_sums,
    lambda dy: dy.new_empty(1, *_groups_of(dy), dtype=torch.float32),
)
register(
    "linear_bias_grad(Tensor sums, int largest, ScalarType dtype, Tensor? beside) -> Tensor",
    linear_bias_grad,
    lambda sums, largest, dtype, beside: sums.new_empty(sums.shape[1] * largest, dtype=dtype),
)
register(
    "layer_scale_grads_(Tensor(a!) p, Tensor? sums, Tensor weight, Tensor? bias, Tensor gamma,"
    " Tensor? corner, int largest, ScalarType dtype, Tensor? beside, Tensor? gamma_beside)"
    " -> (Tensor, Tensor)",
    layer_scale_grads_,
    lambda p, sums, weight, bias, gamma, corner, largest, dtype, *rest: tuple(
        p.new_empty(n, dtype=dtype) for n in (0 if sums is None else largest, largest)
    ),
)
