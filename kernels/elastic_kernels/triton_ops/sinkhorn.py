"""Triton passes of Sinkhorn-Knopp over teacher logits, in the log domain.

    log u_k = -lse_b(t_bk / tau + log v_b),  log v_b = -lse_k(t_bk / tau + log u_k)

A pass reads the logits once, in whatever dtype they are kept, and writes a vector. Columns come as maximum
and sum, so that processes can add theirs; ranges of rows are merged in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import processors
from elastic_kernels.triton_ops.registration import register


@triton.jit
def grow(m, z, y):
    """Running maximum and sum of exponentials with `y` taken in; also the factor of earlier sums."""
    new_m = tl.maximum(m, tl.max(y, 1))
    safe = tl.where(new_m == float("-inf"), 0.0, new_m)
    e = tl.exp(y - safe[:, None])
    shrink = tl.exp(m - safe)
    return new_m, z * shrink + tl.sum(e, 1), e, shrink


@triton.jit(do_not_specialize=["rows"])
def _row_pass_kernel(
    t_ptr, log_u_ptr, log_v_ptr,
    rows, prototypes,
    stride_t,
    inv_tau,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """log v of each row: minus the log-sum-exp over prototypes."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    base = t_ptr + offs_m.to(tl.int64)[:, None] * stride_t
    for start in range(0, prototypes, BLOCK_N):
        offs_k = start + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_k < prototypes)[None, :]
        t = tl.load(base + offs_k[None, :], mask=mask, other=0.0).to(tl.float32) * inv_tau
        log_u = tl.load(log_u_ptr + offs_k, mask=offs_k < prototypes, other=0.0)
        m, z, _, _ = grow(m, z, tl.where(mask, t + log_u[None, :], float("-inf")))
    tl.store(log_v_ptr + offs_m, -(m + tl.log(tl.where(mask_m, z, 1.0))), mask=mask_m)


@triton.jit(do_not_specialize=["rows", "span"])
def _column_pass_kernel(
    t_ptr, log_v_ptr, stats_ptr,
    rows, span, prototypes,
    stride_t,
    inv_tau,
    HAS_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials over a range of rows, for each prototype: `[ranges, 2, prototypes]`."""
    offs_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = offs_k < prototypes
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_N], tl.float32)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, rows), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < tl.minimum(begin + span, rows)
        mask = mask_k[:, None] & mask_m[None, :]
        at = offs_m.to(tl.int64)[None, :] * stride_t + offs_k[:, None]
        y = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32) * inv_tau
        if HAS_V:
            y += tl.load(log_v_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
        m, z, _, _ = grow(m, z, tl.where(mask, y, float("-inf")))
    out = stats_ptr + tl.program_id(1).to(tl.int64) * 2 * prototypes + offs_k
    tl.store(out, m, mask=mask_k)
    tl.store(out + prototypes, z, mask=mask_k)


ROW_PASS, COLUMN_PASS = (4, 1024), (32, 128)  # rows and prototypes of a tile


def sinkhorn_rows(t: Tensor, log_u: Tensor, tau: float) -> Tensor:
    """log v `[rows]` of `t` `[rows, prototypes]`."""
    rows, prototypes = t.shape
    log_v = torch.empty(rows, dtype=torch.float32, device=t.device)
    if rows:
        block_m, block_n = ROW_PASS
        _row_pass_kernel[(triton.cdiv(rows, block_m),)](
            t, log_u, log_v,
            rows, prototypes,
            t.stride(0),
            1 / tau,
            BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
    return log_v


def sinkhorn_columns(t: Tensor, log_v: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    """Maximum `[prototypes]` over rows of `t / tau + log_v`, and the sum of exponentials relative to it."""
    rows, prototypes = t.shape
    block_m, block_n = COLUMN_PASS
    tiles = triton.cdiv(prototypes, block_n)
    ranges = max(min(4 * processors(t.device) // tiles, triton.cdiv(rows, block_m)), 1)
    span = triton.cdiv(triton.cdiv(max(rows, 1), ranges), block_m) * block_m
    stats = torch.empty(ranges, 2, prototypes, dtype=torch.float32, device=t.device)
    _column_pass_kernel[(tiles, ranges)](
        t, log_v, stats,
        rows, span, prototypes,
        t.stride(0),
        1 / tau,
        HAS_V=log_v is not None, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    largest = stats[:, 0].amax(0)
    factor = (stats[:, 0] - largest.nan_to_num(neginf=0.0)).exp()
    return largest, (stats[:, 1] * factor).sum(0)


register(
    "sinkhorn_rows(Tensor t, Tensor log_u, float tau) -> Tensor",
    sinkhorn_rows,
    lambda t, log_u, tau: t.new_empty(t.shape[0], dtype=torch.float32),
)
register(
    "sinkhorn_columns(Tensor t, Tensor? log_v, float tau) -> (Tensor, Tensor)",
    sinkhorn_columns,
    lambda t, *rest: tuple(t.new_empty(t.shape[1], dtype=torch.float32) for _ in range(2)),
)
