"""Gradients of a linear layer's weight, bias and LayerScale.

    P[g] = s dy[g]^T x,  dW = gamma * P,  db = gamma * sum dy,  dgamma = rowsum(P * W) + b * sum dy

The product P is cuBLAS's, with fp32 results of half-precision operands. LayerScale takes one pass over it, of
the weight's size: dgamma needs no saved activation. Whatever makes dy also sums its columns, in parts, which
are added in a fixed order, so that results repeat bitwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv, processors, unit_stride
from elastic_kernels.triton_ops.gemm import product_into
from elastic_kernels.triton_ops.registration import register


@triton.jit(do_not_specialize=["rows", "part_rows"])
def _branch_grad_kernel(
    dout_ptr, index_ptr, row_scale_ptr, d_ptr, sums_ptr,
    rows, part_rows, width,
    stride_o,
    HAS_INDEX: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a part of the rows, scaled and rounded, and their sums; of both what is wanted."""
    part = tl.program_id(1)
    offs_k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_k = offs_k < width
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, rows)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        offs_r = start + tl.arange(0, ROWS)
        mask_r = offs_r < last
        mask = mask_r[:, None] & mask_k[None, :]
        source = offs_r.to(tl.int64)
        if HAS_INDEX:
            source = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
        d = tl.load(dout_ptr + source[:, None] * stride_o + offs_k[None, :], mask=mask, other=0.0)
        d = d.to(tl.float32)
        if HAS_ROW_SCALE:
            d *= tl.load(row_scale_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        if d_ptr is not None:
            out = d_ptr + offs_r.to(tl.int64)[:, None] * width + offs_k[None, :]
            tl.store(out, d.to(d_ptr.dtype.element_ty), mask=mask)
        total += d
    if sums_ptr is not None:
        tl.store(sums_ptr + part * width + offs_k, tl.sum(total, 0), mask=mask_k)


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


COPY_ROWS, COPY_BLOCK = 4, 512  # of `_branch_grad_kernel`: 16 values a thread
COPY_PROGRAMS = 8  # for each processor: 64 KB under way
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


def _parts(dout: Tensor, rows: int) -> int:
    """Into which `_branch_grad_kernel` divides the rows."""
    programs = COPY_PROGRAMS * processors(dout.device) // cdiv(dout.shape[1], COPY_BLOCK)
    return max(min(programs, cdiv(rows, COPY_ROWS)), 1)


def _branch_grad(
    dout: Tensor, index: Tensor | None, row_scale: Tensor | None, d: Tensor | None, wants_sums: bool
) -> Tensor:
    """Write rows of `dout` to `d`; return the sums of their parts, fp32 `[parts, 1, n]`, or nothing."""
    rows, width = (dout if index is None else index).shape[0], dout.shape[1]
    parts = _parts(dout, rows)
    sums = torch.empty(parts if wants_sums else 0, 1, width, dtype=torch.float32, device=dout.device)
    _branch_grad_kernel[(cdiv(width, COPY_BLOCK), parts)](
        dout, index, row_scale, d, sums if wants_sums else None,
        rows, cdiv(rows, parts), width,
        dout.stride(0),
        HAS_INDEX=index is not None, HAS_ROW_SCALE=row_scale is not None,
        ROWS=COPY_ROWS, BLOCK=COPY_BLOCK,
    )  # fmt: skip
    return sums


def branch_grad(
    dout: Tensor, index: Tensor | None, row_scale: Tensor | None, dtype: torch.dtype, wants_sums: bool
) -> tuple[Tensor, Tensor]:
    """Rows of the gradient of a residual sum, scaled and rounded for the products.

    Returns:
        `[kept, n]`, and sums over parts of its rows for a bias, fp32 `[parts, 1, n]`, or empty.
    """
    rows, width = (dout if index is None else index).shape[0], dout.shape[1]
    d = torch.empty(rows, width, dtype=dtype, device=dout.device)
    return d, _branch_grad(unit_stride(dout), index, row_scale, d, wants_sums)


def linear_bias_sums(dy: Tensor) -> Tensor:
    """`dy` `[rows, (groups,) n]` -> sums over parts of its rows, fp32 `[parts, groups, n]`."""
    sums = _branch_grad(unit_stride(dy.flatten(1)), None, None, None, True)
    return sums.view(len(sums), *_groups_of(dy))


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


def _branch_grad_shapes(
    dout: Tensor, index: Tensor | None, row_scale: Tensor | None, dtype: torch.dtype, wants_sums: bool
) -> tuple[Tensor, Tensor]:
    rows = (dout if index is None else index).shape[0]
    parts = _parts(dout, rows) if wants_sums else 0
    sums = dout.new_empty(parts, 1, dout.shape[1], dtype=torch.float32)
    return dout.new_empty(rows, dout.shape[1], dtype=dtype), sums


register(
    "branch_grad(Tensor dout, Tensor? index, Tensor? row_scale, ScalarType dtype, bool wants_sums)"
    " -> (Tensor, Tensor)",
    branch_grad,
    _branch_grad_shapes,
)
register(
    "linear_bias_sums(Tensor dy) -> Tensor",
    linear_bias_sums,
    lambda dy: dy.new_empty(_parts(dy.flatten(1), len(dy)), *_groups_of(dy), dtype=torch.float32),
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
