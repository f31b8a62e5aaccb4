"""The product of a linear layer's weight gradient, and what makes its operand.

    P[g] = s dy[g]^T x

The product is cuBLAS's, with fp32 results of half-precision operands. Whatever makes dy also sums its
columns, in parts; `vector_grads.py` adds them up.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv, processors, unit_stride
from elastic_kernels.triton_ops.gemm import product_into
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import register


@launched("rows", "part_rows")
def _branch_grad_kernel(
    dout_ptr, index_ptr, row_scale_ptr, d_ptr, sums_ptr,
    rows, part_rows, width,
    stride_o,
    HAS_INDEX: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a part of the rows, scaled and rounded, and their sums; of both what is wanted.

    Rows of an index below 0 are zeros.
    """
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
            source = tl.load(index_ptr + offs_r, mask=mask_r, other=-1).to(tl.int64)
        taken = (source >= 0)[:, None] & mask
        d = tl.load(dout_ptr + source[:, None] * stride_o + offs_k[None, :], mask=taken, other=0.0)
        d = d.to(tl.float32)
        if HAS_ROW_SCALE:
            d *= tl.load(row_scale_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        if d_ptr is not None:
            out = d_ptr + offs_r.to(tl.int64)[:, None] * width + offs_k[None, :]
            tl.store(out, d.to(d_ptr.dtype.element_ty), mask=mask)
        total += d
    if sums_ptr is not None:
        tl.store(sums_ptr + part * width + offs_k, tl.sum(total, 0), mask=mask_k)


COPY_ROWS, COPY_BLOCK = 4, 512  # of `_branch_grad_kernel`: 16 values a thread
COPY_PROGRAMS = 8  # for each processor: 64 KB under way


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
    """Rows of the gradient of a residual sum, scaled and rounded for the products; zeros where `index` is -1.

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


register(
    "linear_wgrad(Tensor dy, Tensor x, float scale, ScalarType dtype) -> Tensor",
    linear_wgrad,
    lambda dy, x, scale, dtype: dy.new_empty(*_groups_of(dy), x.shape[1], dtype=dtype),
)
register("linear_wgrad_(Tensor(a!) total, Tensor dy, Tensor x, float scale) -> ()", linear_wgrad_)


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
