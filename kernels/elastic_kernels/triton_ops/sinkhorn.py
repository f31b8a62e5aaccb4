"""Triton passes of Sinkhorn-Knopp over teacher logits, in the log domain, all problems in one launch.

    log u_k = -lse_b(t_bk / tau + log v_b),  log v_b = -lse_k(t_bk / tau + log u_k)

A pass reads the logits once, in whatever dtype they are kept, and writes a vector for all problems, one after
the other. Columns come as maximum and sum, so that processes can add theirs; spans of rows are merged in a
fixed order. A program finds its problem in a table of addresses and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.dispatch import upload
from elastic_kernels.triton_ops.device import cdiv, next_power_of_2
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import register

ROW_PASS, COLUMN_PASS = (4, 1024), (32, 128)  # rows and prototypes of a tile
SPAN = 512  # rows that a program of the column pass sums
MERGE = 256  # prototypes of a program that merges spans
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def grow(m, z, y):
    """Running maximum and sum of powers of 2 with `y` added; the powers, and the factor of earlier sums."""
    new_m = tl.maximum(m, tl.max(y, 1))
    safe = tl.where(new_m == float("-inf"), 0.0, new_m)
    e = tl.exp2(y - safe[:, None])
    shrink = tl.exp2(m - safe)
    return new_m, z * shrink + tl.sum(e, 1), e, shrink


@triton.jit
def _find(starts_ptr, problems, P: tl.constexpr):
    """The problem of this program, and the program's number in it."""
    pid = tl.program_id(0)
    offs = tl.arange(0, P)
    starts = tl.load(starts_ptr + offs, mask=offs < problems, other=0x7FFFFFFF)
    problem = tl.sum((starts <= pid).to(tl.int32), 0) - 1
    return problem, pid - tl.load(starts_ptr + problem).to(tl.int32)


@triton.jit
def _logits(logits_ptr, stride_ptr, prototypes_ptr, problem, dtype: tl.constexpr, EVEN: tl.constexpr):
    """Address, row stride and prototypes of a problem's logits."""
    pointer = tl.load(logits_ptr + problem).to(tl.pointer_type(dtype))
    stride, prototypes = tl.load(stride_ptr + problem), tl.load(prototypes_ptr + problem).to(tl.int32)
    if EVEN:
        pointer, stride = tl.multiple_of(pointer, 16), tl.multiple_of(stride, 16)
        prototypes = tl.multiple_of(prototypes, 16)
    return pointer, stride, prototypes


@launched("problems", "inv_tau")
def _row_pass_kernel(
    logits_ptr, stride_ptr, rows_ptr, prototypes_ptr, first_row_ptr, first_prototype_ptr, starts_ptr,
    log_u_ptr, log_v_ptr,
    problems,
    inv_tau,
    T: tl.constexpr, EVEN: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """log v of each row: minus the log-sum-exp over prototypes; `inv_tau` times log2(e)."""
    problem, tile = _find(starts_ptr, problems, P)
    t_ptr, stride, prototypes = _logits(logits_ptr, stride_ptr, prototypes_ptr, problem, T, EVEN)
    first = tl.load(first_prototype_ptr + problem)
    log_u_ptr += tl.multiple_of(first, 16) if EVEN else first
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tl.load(rows_ptr + problem)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    base = t_ptr + offs_m.to(tl.int64)[:, None] * stride
    for start in range(0, prototypes, BLOCK_N):
        offs_k = start + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_k < prototypes)[None, :]
        t = tl.load(base + offs_k[None, :], mask=mask, other=0.0).to(tl.float32) * inv_tau
        log_u = tl.load(log_u_ptr + offs_k, mask=offs_k < prototypes, other=0.0) * LOG2_E
        m, z, _, _ = grow(m, z, tl.where(mask, t + log_u[None, :], float("-inf")))
    out = log_v_ptr + tl.load(first_row_ptr + problem) + offs_m
    tl.store(out, -(m + tl.log2(tl.where(mask_m, z, 1.0))) * LN_2, mask=mask_m)


@launched("problems", "inv_tau")
def _column_pass_kernel(
    logits_ptr, stride_ptr, rows_ptr, prototypes_ptr, first_row_ptr, stats_at_ptr, starts_ptr,
    log_v_ptr, stats_ptr,
    problems,
    inv_tau,
    HAS_V: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr, P: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials over a span of rows: `[spans, 2, prototypes]` of each problem; with
    `inv_tau` times log2(e)."""
    problem, number = _find(starts_ptr, problems, P)
    t_ptr, stride, prototypes = _logits(logits_ptr, stride_ptr, prototypes_ptr, problem, T, EVEN)
    tiles = tl.cdiv(prototypes, BLOCK_N)
    span, tile = number // tiles, number % tiles
    offs_k = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = offs_k < prototypes
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_N], tl.float32)
    end = tl.minimum((span + 1) * SPAN, tl.load(rows_ptr + problem).to(tl.int32))
    if HAS_V:
        log_v_ptr += tl.load(first_row_ptr + problem)
    for start in range(span * SPAN, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = mask_k[:, None] & (offs_m < end)[None, :]
        at = offs_m.to(tl.int64)[None, :] * stride + offs_k[:, None]
        y = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32) * inv_tau
        if HAS_V:
            y += tl.load(log_v_ptr + offs_m, mask=offs_m < end, other=0.0)[None, :] * LOG2_E
        m, z, _, _ = grow(m, z, tl.where(mask, y, float("-inf")))
    out = stats_ptr + tl.load(stats_at_ptr + problem) + span.to(tl.int64) * 2 * prototypes + offs_k
    tl.store(out, m * LN_2, mask=mask_k)
    tl.store(out + prototypes, z, mask=mask_k)


@launched("problems")
def _column_merge_kernel(
    rows_ptr, prototypes_ptr, first_prototype_ptr, stats_at_ptr, starts_ptr,
    stats_ptr, largest_ptr, sums_ptr,
    problems,
    P: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of each prototype over all spans."""
    problem, tile = _find(starts_ptr, problems, P)
    prototypes = tl.load(prototypes_ptr + problem).to(tl.int32)
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offs < prototypes
    at = stats_ptr + tl.load(stats_at_ptr + problem) + offs
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, tl.maximum(tl.cdiv(tl.load(rows_ptr + problem), SPAN), 1)):
        new = tl.load(at, mask=mask, other=float("-inf"))
        top = tl.maximum(m, new)
        safe = tl.where(top == float("-inf"), 0.0, top)
        z = z * tl.exp(m - safe) + tl.load(at + prototypes, mask=mask, other=0.0) * tl.exp(new - safe)
        m = top
        at += 2 * prototypes
    first = tl.load(first_prototype_ptr + problem)
    tl.store(largest_ptr + first + offs, m, mask=mask)
    tl.store(sums_ptr + first + offs, z, mask=mask)


@triton.jit
def _common(common_ptr, offs, mask):
    """What sums are relative to; 0 where no process has rows."""
    common = tl.load(common_ptr + offs, mask=mask, other=0.0)
    return tl.where(tl.abs(common) < float("inf"), common, 0.0)


@launched("width")
def _column_total_kernel(largest_ptr, sums_ptr, common_ptr, total_ptr, width, BLOCK: tl.constexpr):
    """Sums of exponentials, float64, relative to common numbers instead of each column's largest."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    largest = tl.load(largest_ptr + offs, mask=mask, other=0.0)
    shift = (largest - _common(common_ptr, offs, mask)).to(tl.float64)
    total = tl.load(sums_ptr + offs, mask=mask, other=0.0).to(tl.float64) * tl.exp(shift)
    tl.store(total_ptr + offs, total, mask=mask)


@launched("width")
def _column_scaling_kernel(
    total_ptr, common_ptr, log_u_ptr, lse_ptr,
    width,
    TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log u and minus log u of columns."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    total = tl.maximum(tl.load(total_ptr + offs, mask=mask, other=1.0), TINY)
    lse = (_common(common_ptr, offs, mask).to(tl.float64) + tl.log(total)).to(tl.float32)
    tl.store(log_u_ptr + offs, -lse, mask=mask)
    tl.store(lse_ptr + offs, lse, mask=mask)


class Table(NamedTuple):
    """What a program looks up of its problem, int64 `[problems]` on the device."""

    logits: Tensor
    stride: Tensor
    rows: Tensor
    prototypes: Tensor
    first_row: Tensor
    first_prototype: Tensor
    stats_at: Tensor
    row_starts: Tensor
    column_starts: Tensor
    merge_starts: Tensor


def _counts(logits: Sequence[Tensor]) -> dict[str, list[int]]:
    """Programs of the passes, and elements of vectors and statistics, for each problem."""
    shapes = [tuple(t.shape) for t in logits]
    spans = [max(cdiv(rows, SPAN), 1) for rows, _ in shapes]
    return {
        "row_starts": [cdiv(rows, ROW_PASS[0]) for rows, _ in shapes],
        "column_starts": [cdiv(k, COLUMN_PASS[1]) * n for (_, k), n in zip(shapes, spans, strict=True)],
        "merge_starts": [cdiv(k, MERGE) for _, k in shapes],
        "first_row": [rows for rows, _ in shapes],
        "first_prototype": [k for _, k in shapes],
        "stats_at": [2 * n * k for (_, k), n in zip(shapes, spans, strict=True)],
    }


def sinkhorn_table(logits: list[Tensor]) -> Tensor:
    """`Table` of problems whose logits have contiguous rows, int64 `[fields, problems]`."""
    before = {name: [sum(counts[:i]) for i in range(len(counts))] for name, counts in _counts(logits).items()}
    columns = {
        "logits": [t.data_ptr() for t in logits],
        "stride": [t.stride(0) for t in logits],
        "rows": [t.shape[0] for t in logits],
        "prototypes": [t.shape[1] for t in logits],
        **before,
    }
    return upload(torch.tensor([columns[name] for name in Table._fields]), logits[0].device)


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _constants(logits: Sequence[Tensor]) -> dict[str, object]:
    """Of the kernels that read logits."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 == t.shape[1] % 16 for t in logits)
    return {"T": TRITON_DTYPES[logits[0].dtype], "EVEN": aligned, "P": next_power_of_2(len(logits))}


def sinkhorn_rows(logits: list[Tensor], table: Tensor, log_u: Tensor, tau: float) -> Tensor:
    """log v `[all rows]` of logits `[rows_i, prototypes_i]`; log_u `[all prototypes]`."""
    counts, at = _counts(logits), Table(*table)
    log_v = torch.empty(sum(counts["first_row"]), dtype=torch.float32, device=log_u.device)
    if len(log_v):
        _row_pass_kernel[(sum(counts["row_starts"]),)](
            at.logits, at.stride, at.rows, at.prototypes, at.first_row, at.first_prototype, at.row_starts,
            log_u, log_v,
            len(logits),
            LOG2_E.value / tau,
            BLOCK_M=ROW_PASS[0], BLOCK_N=ROW_PASS[1], **_constants(logits),
        )  # fmt: skip
    return log_v


def sinkhorn_columns(
    logits: list[Tensor], table: Tensor, log_v: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """Maximum `[all prototypes]` over rows of `t / tau + log_v`; sum of exponentials relative to it."""
    counts, at, constants = _counts(logits), Table(*table), _constants(logits)
    width = sum(counts["first_prototype"])
    stats, largest, sums = (
        torch.empty(size, dtype=torch.float32, device=table.device)
        for size in (sum(counts["stats_at"]), width, width)
    )
    _column_pass_kernel[(sum(counts["column_starts"]),)](
        at.logits, at.stride, at.rows, at.prototypes, at.first_row, at.stats_at, at.column_starts,
        log_v, stats,
        len(logits),
        LOG2_E.value / tau,
        HAS_V=log_v is not None,
        SPAN=SPAN, BLOCK_M=COLUMN_PASS[0], BLOCK_N=COLUMN_PASS[1], **constants,
    )  # fmt: skip
    _column_merge_kernel[(sum(counts["merge_starts"]),)](
        at.rows, at.prototypes, at.first_prototype, at.stats_at, at.merge_starts,
        stats, largest, sums,
        len(logits),
        P=constants["P"], SPAN=SPAN, BLOCK=MERGE,
    )  # fmt: skip
    return largest, sums


def sinkhorn_total(largest: Tensor, sums: Tensor, common: Tensor) -> Tensor:
    """Sums of exponentials relative to common numbers, float64, of those relative to the largest."""
    total = torch.empty(largest.shape, dtype=torch.float64, device=largest.device)
    grid = (cdiv(len(total), MERGE),)
    _column_total_kernel[grid](largest, sums, common, total, len(total), BLOCK=MERGE, num_warps=2)
    return total


def sinkhorn_scaling(total: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """log u and minus log u, of sums of exponentials over all processes."""
    log_u, lse = (torch.empty(common.shape, dtype=torch.float32, device=common.device) for _ in range(2))
    tiny, grid = torch.finfo(torch.float64).tiny, (cdiv(len(total), MERGE),)
    _column_scaling_kernel[grid](total, common, log_u, lse, len(total), TINY=tiny, BLOCK=MERGE, num_warps=2)
    return log_u, lse


def _fp32(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


register(
    "sinkhorn_table(Tensor[] logits) -> Tensor",
    sinkhorn_table,
    lambda logits: logits[0].new_empty(len(Table._fields), len(logits), dtype=torch.int64),
)
register(
    "sinkhorn_rows(Tensor[] logits, Tensor table, Tensor log_u, float tau) -> Tensor",
    sinkhorn_rows,
    lambda logits, table, log_u, tau: _fp32(table, sum(t.shape[0] for t in logits)),
)
register(
    "sinkhorn_columns(Tensor[] logits, Tensor table, Tensor? log_v, float tau) -> (Tensor, Tensor)",
    sinkhorn_columns,
    lambda logits, *rest: tuple(_fp32(logits[0], sum(t.shape[1] for t in logits)) for _ in range(2)),
)
register(
    "sinkhorn_total(Tensor largest, Tensor sums, Tensor common) -> Tensor",
    sinkhorn_total,
    lambda largest, *rest: largest.new_empty(largest.shape, dtype=torch.float64),
)
register(
    "sinkhorn_scaling(Tensor total, Tensor common) -> (Tensor, Tensor)",
    sinkhorn_scaling,
    lambda total, common: tuple(torch.empty_like(common) for _ in range(2)),
)
