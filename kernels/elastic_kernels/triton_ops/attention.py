"""Triton kernels of packed attention: one program owns a sequence and a head.

    s = scale * q k^T,  p = softmax(s),  o = p v
    dv = p^T do,  ds = p * (do v^T - rowsum(do * o)),  dq = scale * ds k,  dk = scale * ds^T q

Sequences here are short (197 and 37 tokens), so keys and values of a head stay on chip while its queries go
by: no work list, no online rescaling, and in the backward no atomics and no separate pass for rowsum(do * o).
Lengths above 256, wide heads and fp32 take the streaming forward, with an online softmax over blocks of keys.

Saved for backward: qkv, o and the fp32 log-sum-exp of each row. Bytes: forward reads 3 and writes 1 of
tokens * channels elements; backward reads 5 (qkv, o, do) and writes 3; the log-sum-exp adds 4 bytes a row
and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import SMALL_PARTS, capability, precision
from elastic_kernels.triton_ops.gemm import dot
from elastic_kernels.triton_ops.heads import head_block, of_head
from elastic_kernels.triton_ops.registration import first_order, register
from elastic_kernels.tuning import Tunable, power_of_2

LOG2_E = 1.4426950408889634  # the kernels work with powers of 2


@triton.jit
def _load_rows(base, offs_n, offs_d, stride_t, mask):
    return tl.load(base + offs_n[:, None] * stride_t + offs_d[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["first_token", "length", "heads"])
def _attention_resident_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr,
    first_token, length, heads,
    stride_t, stride_g, stride_h,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    row = first_token + (pid // heads).to(tl.int64) * length
    base = qkv_ptr + row * stride_t + head * stride_h
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < length
    cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
    k = _load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
    v = _load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
    for start_m in range(0, length, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
        q = _load_rows(base, offs_m, offs_d, stride_t, cells_m)
        s = dot(q, tl.trans(k), None, PRECISION) * scale_log2
        s = tl.where(mask_n[None, :], s, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2(s - m[:, None])
        z = tl.sum(p, 1)
        o = dot(p.to(v.dtype), v, None, PRECISION) / z[:, None]
        rows = row + offs_m
        outs = out_ptr + (rows[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
        tl.store(outs, o.to(out_ptr.dtype.element_ty), mask=cells_m)
        tl.store(lse_ptr + rows * heads + head, m + tl.log2(z), mask=mask_m)


@triton.jit(do_not_specialize=["first_token", "length", "heads"])
def _attention_streaming_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr,
    first_token, length, heads,
    stride_t, stride_g, stride_h,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    row = first_token + (pid // heads).to(tl.int64) * length
    base = qkv_ptr + row * stride_t + head * stride_h
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length
    cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
    q = _load_rows(base, offs_m, offs_d, stride_t, cells_m)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, length, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
        k = _load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
        s = dot(q, tl.trans(k), None, PRECISION) * scale_log2
        s = tl.where(mask_n[None, :], s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        z = z * shrink + tl.sum(p, 1)
        v = _load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
        o = dot(p.to(v.dtype), v, o * shrink[:, None], PRECISION)
        m = new_m
    rows = row + offs_m
    outs = out_ptr + (rows[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
    tl.store(outs, (o / z[:, None]).to(out_ptr.dtype.element_ty), mask=cells_m)
    tl.store(lse_ptr + rows * heads + head, m + tl.log2(z), mask=mask_m)


@triton.jit(do_not_specialize=["first_token", "length", "heads"])
def _attention_bwd_kernel(
    qkv_ptr, out_ptr, dout_ptr, lse_ptr, dqkv_ptr,
    first_token, length, heads,
    stride_t, stride_g, stride_h,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a sequence and head: dk and dv by blocks of keys, then dq by blocks of queries."""
    pid = tl.program_id(0)
    head = pid % heads
    row = first_token + (pid // heads).to(tl.int64) * length
    base = qkv_ptr + row * stride_t + head * stride_h
    # out, dout and dqkv are contiguous: [tokens, heads, d] and [tokens, 3, heads, d].
    outs = (row * heads + head) * HEAD_DIM
    grads = dqkv_ptr + (row * 3 * heads + head) * HEAD_DIM
    lses = lse_ptr + row * heads + head
    out_t, grad_t, grad_g = heads * HEAD_DIM, 3 * heads * HEAD_DIM, heads * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_D)

    for start_n in range(0, length, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
        k = _load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
        v = _load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start_m in range(0, length, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            mask_m = offs_m < length
            cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
            q = _load_rows(base, offs_m, offs_d, stride_t, cells_m)
            do = _load_rows(dout_ptr + outs, offs_m, offs_d, out_t, cells_m)
            o = _load_rows(out_ptr + outs, offs_m, offs_d, out_t, cells_m)
            lse = tl.load(lses + offs_m * heads, mask=mask_m, other=float("inf"))
            delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
            # Transposed scores [keys, queries]: padded queries get p = 0 from their infinite lse.
            s = dot(k, tl.trans(q), None, PRECISION) * scale_log2
            p = tl.exp2(s - lse[None, :])
            dv = dot(p.to(do.dtype), do, dv, PRECISION)
            dp = dot(v, tl.trans(do), None, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk, PRECISION)
        ends = grads + offs_n[:, None] * grad_t + offs_d[None, :]
        tl.store(ends + grad_g, (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=cells_n)
        tl.store(ends + 2 * grad_g, dv.to(dqkv_ptr.dtype.element_ty), mask=cells_n)

    for start_m in range(0, length, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
        q = _load_rows(base, offs_m, offs_d, stride_t, cells_m)
        do = _load_rows(dout_ptr + outs, offs_m, offs_d, out_t, cells_m)
        o = _load_rows(out_ptr + outs, offs_m, offs_d, out_t, cells_m)
        lse = tl.load(lses + offs_m * heads, mask=mask_m, other=float("inf"))
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start_n in range(0, length, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < length
            cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
            k = _load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
            v = _load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
            s = dot(q, tl.trans(k), None, PRECISION) * scale_log2
            s = tl.where(mask_n[None, :], s, float("-inf"))
            p = tl.exp2(s - lse[:, None])
            dp = dot(do, tl.trans(v), None, PRECISION)
            ds = p * (dp - delta[:, None])
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)
        ends = grads + offs_m[:, None] * grad_t + offs_d[None, :]
        tl.store(ends, (dq * scale).to(dqkv_ptr.dtype.element_ty), mask=cells_m)


@dataclass(frozen=True)
class AttentionConfig:
    """Launch settings of a length class.

    Attributes:
        block_m, block_n: rows of a tile of queries, of keys.
        warps, stages: of the launch.
        resident: all keys fit into one tile, so the kernel without online softmax runs.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int = 1
    resident: bool = False


# The largest tiles that compile without spilling on 4 warps: more would compute the rows of a tile twice, and
# leave room for one block only. Not timed on a GPU yet. Parts with 99 KB of shared memory a block
# (`device.SMALL_PARTS`) also spill earlier, and get smaller ones.
_RESIDENT = (  # (longest length, settings), half precision and head_dim up to 64
    (64, AttentionConfig(64, 64, warps=4, resident=True)),
    (128, AttentionConfig(64, 128, warps=4, resident=True)),
    (256, AttentionConfig(64, 256, warps=4, resident=True)),
)
_STREAMING = AttentionConfig(64, 64, warps=4, stages=2)
_FWD_FP32 = AttentionConfig(32, 32, warps=8)  # exact products run on the plain units, from registers
_BWD = AttentionConfig(64, 64, warps=4)
_BWD_WIDE = AttentionConfig(32, 64, warps=4)  # where 64x64 spills: wide heads, and all on sm_80
_BWD_SMALL_PART = AttentionConfig(32, 32, warps=4)
_BWD_FP32 = AttentionConfig(32, 32, warps=8)
_BWD_FP32_WIDE = AttentionConfig(16, 16, warps=8)


def fwd_config(length: int, head_dim: int, itemsize: int, part: tuple[int, int]) -> AttentionConfig:
    """Settings of the forward for sequences of a length; `part`: compute capability."""
    if itemsize == 4:
        return _FWD_FP32
    if head_dim <= 64:
        for longest, config in _RESIDENT[: 2 if part in SMALL_PARTS else None]:
            if length <= longest:
                return config
    return _STREAMING


def bwd_config(head_dim: int, itemsize: int, part: tuple[int, int]) -> AttentionConfig:
    """Settings of the backward; `part` as in `fwd_config`."""
    if itemsize == 4:
        return _BWD_FP32_WIDE if head_dim > 64 else _BWD_FP32
    if part in SMALL_PARTS:
        return _BWD_SMALL_PART
    return _BWD_WIDE if head_dim > 64 or part < (9, 0) else _BWD


def _fwd_candidates(length: int, head_dim: int) -> list[AttentionConfig]:
    """Streaming ones take any length, resident ones what fits into a tile."""
    streaming = (
        _STREAMING,
        AttentionConfig(64, 128, warps=4, stages=2),
        AttentionConfig(128, 64, warps=4, stages=2),
        AttentionConfig(128, 64, warps=8, stages=2),
        AttentionConfig(128, 128, warps=8, stages=2),
    )
    resident = (
        AttentionConfig(64, keys, warps, resident=True)
        for keys in (64, 128, 256)
        for warps in (4, 8)
        if length <= keys
    )
    return [*streaming, *resident]


_BWD_CANDIDATES = (
    _BWD,
    _BWD_WIDE,
    _BWD_SMALL_PART,
    AttentionConfig(64, 64, warps=8),
    AttentionConfig(64, 32, warps=4),
    AttentionConfig(128, 64, warps=8),
)
_FWD_TUNABLE = Tunable("attention_fwd", _fwd_candidates)
_BWD_TUNABLE = Tunable("attention_bwd", lambda length, head_dim: _BWD_CANDIDATES)


def _config(tunable: Tunable, fallback: AttentionConfig, qkv: Tensor, length: int) -> AttentionConfig:
    """Settings for sequences of a length; exact products keep the fallback."""
    if qkv.dtype.itemsize == 4:
        return fallback
    return tunable.choose(qkv, (power_of_2(length), qkv.shape[3]), fallback)


def attention_fwd(qkv: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`[tokens, 3, heads, d]` -> out `[tokens, heads * d]`, fp32 log2-sum-exp2 `[tokens, heads]`."""
    tokens, _, heads, dim = qkv.shape
    out = torch.empty(tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=qkv.device)
    for first, count, length in _spans(groups):
        fallback = fwd_config(length, dim, qkv.dtype.itemsize, capability(qkv.device))
        config = _config(_FWD_TUNABLE, fallback, qkv, length)
        kernel = _attention_resident_fwd_kernel if config.resident else _attention_streaming_fwd_kernel
        tiles = 1 if config.resident else triton.cdiv(length, config.block_m)
        kernel[(count * heads, tiles)](
            qkv, out, lse,
            first, length, heads,
            *qkv.stride()[:3],
            dim**-0.5 * LOG2_E,
            HEAD_DIM=dim, BLOCK_D=head_block(dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PRECISION=precision(qkv), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, lse


def attention_bwd(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, groups: Sequence[int]) -> Tensor:
    """The gradient `[tokens, 3, heads, d]` of qkv; `out`, `lse` and `dout` are contiguous."""
    heads, dim = qkv.shape[2:]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    fallback = bwd_config(dim, qkv.dtype.itemsize, capability(qkv.device))
    for first, count, length in _spans(groups):
        config = _config(_BWD_TUNABLE, fallback, qkv, length)
        _attention_bwd_kernel[(count * heads,)](
            qkv, out, dout, lse, dqkv,
            first, length, heads,
            *qkv.stride()[:3],
            dim**-0.5, dim**-0.5 * LOG2_E,
            HEAD_DIM=dim, BLOCK_D=head_block(dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PRECISION=precision(qkv), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return dqkv


def _spans(groups: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, sequences, length) of each group that has tokens; groups are flat pairs."""
    spans, first = [], 0
    for count, length in zip(groups[::2], groups[1::2], strict=True):
        if count and length:
            spans.append((first, count, length))
        first += count * length
    return spans


register(
    "attention_fwd(Tensor qkv, int[] groups) -> (Tensor, Tensor)",
    attention_fwd,
    lambda qkv, groups: (
        qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3]),
        qkv.new_empty(qkv.shape[0], qkv.shape[2], dtype=torch.float32),
    ),
)
register(
    "attention_bwd(Tensor qkv, Tensor out, Tensor lse, Tensor dout, int[] groups) -> Tensor",
    attention_bwd,
    lambda qkv, *rest: qkv.new_empty(qkv.shape),
)


class AttentionFunction(torch.autograd.Function):
    """Attention with its gradient; outside of the registered operators, which saves host time."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: list[int]) -> Tensor:
        if qkv.stride(-1) != 1:
            qkv = qkv.contiguous()
        out, lse = torch.ops.elastic_kernels.attention_fwd(qkv, groups)
        ctx.save_for_backward(qkv, out, lse)
        ctx.groups = groups
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        qkv, out, lse = ctx.saved_tensors
        return torch.ops.elastic_kernels.attention_bwd(qkv, out, lse, dout.contiguous(), ctx.groups), None
