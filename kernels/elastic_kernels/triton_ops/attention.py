"""Triton kernels of packed attention: one program owns a sequence and a head.

    s = scale * q k^T,  p = softmax(s),  o = p v
    dv = p^T do,  ds = p * (do v^T - rowsum(do * o)),  dq = scale * ds k,  dk = scale * ds^T q

Sequences here are short (197 and 37 tokens), so keys and values of a head stay on chip while its queries go
by: no work list, no online rescaling, and in the backward no atomics and no separate pass for rowsum(do * o).
Up to 64 tokens are one tile, of which the backward makes five products; else it makes seven, scores twice:
for dq, which also notes rowsum(do * o), then for dk and dv.
Lengths above 256, wide heads and fp32 take the streaming forward, with an online softmax over blocks of keys.

Saved for backward: qkv, o and the fp32 log-sum-exp of each row. A sequence may lack heads: its programs for
these find no tokens. Bytes: forward reads 3 and writes 1 of
tokens * channels elements; backward reads 5 (qkv, o, do) and writes 3; the log-sum-exp adds 4 bytes a row
and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.attention_blocks import (
    LOG2_E,
    Span,
    attend_rows,
    blocks_bwd,
    keys_gradients,
    length_in,
    load_rows,
    outputs_of,
    queries_gradients,
    store_sums,
)
from elastic_kernels.triton_ops.attention_settings import (
    BWD_TUNABLE,
    FWD_TUNABLE,
    LONGEST_OF_ONE_PROGRAM,
    AttentionConfig,
    bwd_config,
    config_of,
    fwd_config,
)
from elastic_kernels.triton_ops.device import capability, cdiv, precision, unit_stride
from elastic_kernels.triton_ops.gemm import dot
from elastic_kernels.triton_ops.heads import head_block, of_head
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import first_order, ops, register


@launched("first_token", "length", "heads")
def _attention_resident_fwd_kernel(
    qkv_ptr, active_ptr, out_ptr, lse_ptr,
    first_token, length, heads,
    stride_t, stride_g, stride_h,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    row = first_token + (pid // heads).to(tl.int64) * length
    length = length_in(active_ptr, row, head, length)
    base = qkv_ptr + row * stride_t + head * stride_h
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < length
    cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
    k = load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
    v = load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
    for start_m in range(0, length, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
        q = load_rows(base, offs_m, offs_d, stride_t, cells_m)
        s = dot(q, tl.trans(k), None, PRECISION) * scale_log2
        s = tl.where(mask_n[None, :], s, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2(s - m[:, None])
        z = tl.sum(p, 1)
        o = dot(p.to(v.dtype), v, None, PRECISION) / z[:, None]
        rows = row + offs_m
        outs = out_ptr + (rows[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
        tl.store(outs, o.to(out_ptr.dtype.element_ty), mask=cells_m)
        if lse_ptr is not None:
            tl.store(lse_ptr + rows * heads + head, m + tl.log2(z), mask=mask_m)


@launched("first_token", "length", "heads")
def _attention_streaming_fwd_kernel(
    qkv_ptr, active_ptr, out_ptr, lse_ptr,
    first_token, length, heads,
    stride_t, stride_g, stride_h,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    row = first_token + (pid // heads).to(tl.int64) * length
    length = length_in(active_ptr, row, head, length)
    base = qkv_ptr + row * stride_t + head * stride_h
    attend_rows(
        base, out_ptr, lse_ptr, row, tl.program_id(1) * BLOCK_M, length, head, heads, stride_t, stride_g,
        scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip


@launched("first_token", "first_part", "length", "heads")
def _attention_bwd_kernel(
    qkv_ptr, active_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, sums_ptr,
    first_token, first_part, length, heads,
    stride_t, stride_g, stride_h,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a sequence and head: dq by blocks of queries, then dk and dv by blocks of keys."""
    pid = tl.program_id(0)
    head = pid % heads
    row = first_token + (pid // heads).to(tl.int64) * length
    length = length_in(active_ptr, row, head, length)
    base = qkv_ptr + row * stride_t + head * stride_h
    part = first_part + pid // heads * tl.cdiv(length, BLOCK_M)
    for start_m in range(0, length, BLOCK_M):
        queries_gradients(
            base, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, sums_ptr, part + start_m // BLOCK_M,
            row, start_m, length, head, heads, stride_t, stride_g,
            scale, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()  # rowsum(do * o) is read by other threads than wrote it
    for start_n in range(0, length, BLOCK_N):
        keys_gradients(
            base, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, row, start_n, length, head, heads,
            stride_t, stride_g, scale, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip


@launched("first_token", "first_part", "length", "heads")
def _attention_resident_bwd_kernel(
    qkv_ptr, active_ptr, out_ptr, dout_ptr, lse_ptr, dqkv_ptr, sums_ptr,
    first_token, first_part, length, heads,
    stride_t, stride_g, stride_h,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a sequence and head that fill at most one square tile: every product is made once."""
    pid = tl.program_id(0)
    head = pid % heads
    row = first_token + (pid // heads).to(tl.int64) * length
    length = length_in(active_ptr, row, head, length)
    base = qkv_ptr + row * stride_t + head * stride_h
    outs, out_t = (row * heads + head) * HEAD_DIM, heads * HEAD_DIM
    offs, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask = offs < length
    cells = of_head(mask, HEAD_DIM, BLOCK_D)
    q = load_rows(base, offs, offs_d, stride_t, cells)
    k = load_rows(base + stride_g, offs, offs_d, stride_t, cells)
    v = load_rows(base + 2 * stride_g, offs, offs_d, stride_t, cells)
    do = load_rows(dout_ptr + outs, offs, offs_d, out_t, cells)
    o = load_rows(out_ptr + outs, offs, offs_d, out_t, cells)
    lse = tl.load(lse_ptr + (row + offs) * heads + head, mask=mask, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    # Transposed scores [keys, queries]: padded queries get p = 0 from their infinite lse.
    s = dot(k, tl.trans(q), None, PRECISION) * scale_log2
    p = tl.where(mask[:, None], tl.exp2(s - lse[None, :]), 0.0)
    dv = dot(p.to(do.dtype), do, None, PRECISION)
    grads = dqkv_ptr + (row * 3 * heads + head) * HEAD_DIM + offs[:, None] * 3 * out_t + offs_d[None, :]
    tl.store(grads + 2 * out_t, dv.to(dqkv_ptr.dtype.element_ty), mask=cells)
    dp = dot(v, tl.trans(do), None, PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = dot(ds, q, None, PRECISION)
    tl.store(grads + out_t, (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=cells)
    dq = dot(tl.trans(ds), k, None, PRECISION)
    tl.store(grads, (dq * scale).to(dqkv_ptr.dtype.element_ty), mask=cells)
    if sums_ptr is not None:
        store_sums(sums_ptr, first_part + pid // heads, head, heads, dq, do, scale, HEAD_DIM, BLOCK_D)


def attention_fwd(
    qkv: Tensor, groups: Sequence[int], active: Tensor | None = None, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention within groups of sequences.

    Args:
        qkv: `[tokens, 3, heads, d]`.
        groups: flat pairs.
        active: int64 `[tokens]`, heads that each row has, equal in a sequence; None means all.
        keep: also give what backward reads.

    Returns:
        out `[tokens, heads * d]`, and fp32 log2-sum-exp2 `[tokens, heads]` if kept, else empty.
    """
    heads, dim = qkv.shape[2:]
    out, lse = outputs_of(qkv, active, keep)
    for first, count, length in _spans(groups):
        fallback = fwd_config(length, dim, qkv.dtype.itemsize, capability(qkv.device))
        config = config_of(FWD_TUNABLE, fallback, qkv, length)
        kernel = _attention_resident_fwd_kernel if config.resident else _attention_streaming_fwd_kernel
        tiles = 1 if config.resident else cdiv(length, config.block_m)
        kernel[(count * heads, tiles)](
            qkv, active, out, lse if keep else None,
            first, length, heads,
            *qkv.stride()[:3],
            dim**-0.5 * LOG2_E,
            HEAD_DIM=dim, BLOCK_D=head_block(dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PRECISION=precision(qkv), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, lse


def attention_bwd(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    groups: Sequence[int],
    wants_sums: bool,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Through attention; `out`, `lse` and `dout` are contiguous. Sums are of rows that have all heads.

    Returns:
        The gradient `[tokens, 3, heads, d]` of qkv, and for a bias sums over parts of its tokens, fp32
        `[parts, 3, heads * d]`, or empty.
    """
    heads, dim = qkv.shape[2:]
    make = torch.empty if active is None else torch.zeros
    dqkv = make(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parts = _parts(qkv, groups) if wants_sums else 0
    sums = torch.empty(parts, 3, heads * dim, dtype=torch.float32, device=qkv.device)
    wanted, first_part = sums if wants_sums else None, 0
    for first, count, length in _spans(groups):
        config = _bwd_config(qkv, length, wants_sums)
        if length > LONGEST_OF_ONE_PROGRAM:
            span = Span(None, first, count, length, active)
            blocks_bwd(qkv, out, lse, dout, dqkv, span, config, wanted, first_part)
        else:
            kernel = _attention_resident_bwd_kernel if config.resident else _attention_bwd_kernel
            scratch = () if config.resident else (torch.empty_like(lse),)
            kernel[(count * heads,)](
                qkv, active, out, dout, lse, *scratch, dqkv, wanted,
                first, first_part, length, heads,
                *qkv.stride()[:3],
                dim**-0.5, dim**-0.5 * LOG2_E,
                HEAD_DIM=dim, BLOCK_D=head_block(dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                PRECISION=precision(qkv), num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        first_part += count * cdiv(length, config.block_m)
    return dqkv, sums


def _bwd_config(qkv: Tensor, length: int, sums: bool) -> AttentionConfig:
    fallback = bwd_config(length, qkv.shape[3], qkv.dtype.itemsize, capability(qkv.device), sums)
    return config_of(BWD_TUNABLE, fallback, qkv, length)


def _parts(qkv: Tensor, groups: Sequence[int]) -> int:
    """Blocks of queries in the backward."""
    spans = _spans(groups)
    return sum(count * cdiv(length, _bwd_config(qkv, length, True).block_m) for _, count, length in spans)


def _spans(groups: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, sequences, length) of each group that has tokens; groups are flat pairs."""
    spans, first = [], 0
    for count, length in zip(groups[::2], groups[1::2], strict=True):
        if count and length:
            spans.append((first, count, length))
        first += count * length
    return spans


register(
    "attention_fwd(Tensor qkv, int[] groups, Tensor? active=None, bool keep=True) -> (Tensor, Tensor)",
    attention_fwd,
    lambda qkv, groups, active=None, keep=True: outputs_of(qkv, active, keep),
)
register(
    "attention_bwd(Tensor qkv, Tensor out, Tensor lse, Tensor dout, int[] groups, bool wants_sums,"
    " Tensor? active=None) -> (Tensor, Tensor)",
    attention_bwd,
    lambda qkv, out, lse, dout, groups, wants_sums, active=None: (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(_parts(qkv, groups) if wants_sums else 0, 3, out.shape[1], dtype=torch.float32),
    ),
)


class AttentionFunction(torch.autograd.Function):
    """Attention with its gradient; outside of the registered operators, which saves host time."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: list[int], active: Tensor | None, trains: bool) -> Tensor:
        qkv = unit_stride(qkv)
        active = None if active is None else active.contiguous()
        out, lse = ops.attention_fwd(qkv, groups, active, trains and ctx.needs_input_grad[0])
        ctx.save_for_backward(qkv, out, lse, active)
        ctx.groups = groups
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, out, lse, active = ctx.saved_tensors
        dqkv, _ = ops.attention_bwd(qkv, out, lse, dout.contiguous(), ctx.groups, False, active)
        return dqkv, None, None, None
