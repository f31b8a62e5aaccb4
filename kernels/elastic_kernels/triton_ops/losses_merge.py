"""Triton kernel that makes cross-entropies over prototypes of what ranges of prototypes left.

A row of a range leaves STATS figures: m1 z1 m2 z2, of each of two targets m z a1 a2, and the sum of the
distillation. z is a sum of powers of 2 relative to a maximum m, the rest are sums of student logits weighted
by such; logits are in powers of 2. Ranges are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.sinkhorn import LN_2

STATS = 13
ROWS = 128  # of a program


@triton.jit
def _merged(at, ranges, rows, mask, M: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Of all ranges: the maximum, the logarithm of the sum relative to it, and the means of two figures."""
    top = tl.full(at.shape, float("-inf"), tl.float32)
    for part in range(ranges):
        top = tl.maximum(top, tl.load(at + (part * 13 + M) * rows, mask=mask, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    z = tl.zeros(at.shape, tl.float32)
    a = tl.zeros(at.shape, tl.float32)
    b = tl.zeros(at.shape, tl.float32)
    for part in range(ranges):
        figures = at + part * 13 * rows
        factor = tl.exp2(tl.load(figures + M * rows, mask=mask, other=0.0) - shift)
        z += factor * tl.load(figures + (M + 1) * rows, mask=mask, other=0.0)
        a += factor * tl.load(figures + A * rows, mask=mask, other=0.0)
        b += factor * tl.load(figures + B * rows, mask=mask, other=0.0)
    z = tl.where(z == 0, 1.0, z)  # without a target
    return top, tl.log2(z), a / z, b / z


@launched("ranges", "rows", "stride_l")
def _losses_merge_kernel(
    stats_ptr, index_ptr, losses_ptr, lse_ptr,
    ranges, rows, stride_l,
    TWO: tl.constexpr, TARGETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < rows
    at = stats_ptr + offs
    has_a = tl.load(index_ptr + TARGETS * offs, mask=mask, other=-1) >= 0
    top1, rest1, across, _ = _merged(at, ranges, rows, mask, 0, 12, 12)
    top_a, rest_a, a1, a2 = _merged(at, ranges, rows, mask, 4, 6, 7)
    KEEP: tl.constexpr = lse_ptr is not None
    if KEEP:
        lse = lse_ptr + offs
        tl.store(lse, top1, mask=mask)
        tl.store(lse + 2 * rows, top_a, mask=mask)
        tl.store(lse + 4 * rows, rest1, mask=mask)
        tl.store(lse + 6 * rows, rest_a, mask=mask)
    loss = tl.where(has_a, top1 + rest1 - a1, 0.0)
    if TARGETS == 2:
        has_b = tl.load(index_ptr + 2 * offs + 1, mask=mask, other=-1) >= 0
        top_b, rest_b, b1, b2 = _merged(at, ranges, rows, mask, 8, 10, 11)
        if KEEP:
            tl.store(lse + 3 * rows, top_b, mask=mask)
            tl.store(lse + 7 * rows, rest_b, mask=mask)
        loss += tl.where(has_b, top1 + rest1 - b1, 0.0)
    tl.store(losses_ptr + offs, loss * LN_2, mask=mask)
    if TWO:
        top2, rest2, _, _ = _merged(at, ranges, rows, mask, 2, 12, 12)
        if KEEP:
            tl.store(lse + rows, top2, mask=mask)
            tl.store(lse + 5 * rows, rest2, mask=mask)
        lse2 = top2 + rest2
        loss = tl.where(has_a, lse2 - a2, 0.0)
        if TARGETS == 2:
            loss += tl.where(has_b, lse2 - b2, 0.0)
        tl.store(losses_ptr + stride_l + offs, loss * LN_2, mask=mask)
        tl.store(losses_ptr + 2 * stride_l + offs, (lse2 - across) * LN_2, mask=mask)


def merge(stats: Tensor, index: Tensor, students: int, losses: Tensor, keep: bool) -> Tensor:
    """Write the losses, and return the log-sum-exps, of all ranges.

    Args:
        stats: fp32 `[ranges, STATS, rows]`.
        index: int64 `[rows, 1 or 2]`, targets of a row or -1.
        students: one or two.
        losses: fp32 `[1 or 3, rows]`, of each student and of the distillation.
        keep: also give what backward reads.

    Returns:
        Logarithms to base 2 of sums of powers of 2 `[8, rows]` of two students and two targets, as maximum
        and the rest; those of what is not there are not written; `[0, rows]` if not kept.
    """
    ranges, _, rows = stats.shape
    lse = torch.empty(8 if keep else 0, rows, dtype=torch.float32, device=stats.device)
    if rows:
        _losses_merge_kernel[(cdiv(rows, ROWS),)](
            stats, index, losses, lse if keep else None,
            ranges, rows, losses.stride(0),
            TWO=students == 2, TARGETS=index.shape[1], BLOCK=ROWS,
        )  # fmt: skip
    return lse
