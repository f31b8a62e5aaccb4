"""Blocks of rows of packed attention, and kernels whose programs own blocks of a sequence, not all of it.

For sequences of any length: given by their offsets, which stay on the device, or longer than one program
should take alone. One launch serves all of them. Formulas and what is saved are those of `attention.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.attention_settings import AttentionConfig, bwd_config, fwd_config
from elastic_kernels.triton_ops.device import capability, cdiv, precision, unit_stride
from elastic_kernels.triton_ops.gemm import dot
from elastic_kernels.triton_ops.heads import head_block, of_head
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import first_order, ops, register

LOG2_E = 1.4426950408889634  # the kernels work with powers of 2


@triton.jit
def load_rows(base, offs_n, offs_d, stride_t, mask):
    return tl.load(base + offs_n[:, None] * stride_t + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def length_in(active_ptr, row, head, length):
    """Tokens that a head of the sequence that begins at `row` attends to: none if the row lacks it."""
    if active_ptr is not None:
        active = tl.load(active_ptr + row, mask=length > 0, other=0)
        length = tl.where(head < active, length, 0)
    return length


@triton.jit
def attend_rows(
    base, out_ptr, lse_ptr, row, start_m, length, head, heads, stride_t, stride_g, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of BLOCK_M queries of the sequence that begins at `row`, by an online softmax over its keys."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length
    cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
    q = load_rows(base, offs_m, offs_d, stride_t, cells_m)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, length, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
        k = load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
        s = dot(q, tl.trans(k), None, PRECISION) * scale_log2
        s = tl.where(mask_n[None, :], s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        z = z * shrink + tl.sum(p, 1)
        v = load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
        o = dot(p.to(v.dtype), v, o * shrink[:, None], PRECISION)
        m = new_m
    rows = row + offs_m
    outs = out_ptr + (rows[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
    tl.store(outs, (o / z[:, None]).to(out_ptr.dtype.element_ty), mask=cells_m)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows * heads + head, m + tl.log2(z), mask=mask_m)


@triton.jit
def keys_gradients(
    base, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    row, start_n, length, head, heads, stride_t, stride_g, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of the sequence that begins at `row`; `delta_ptr`: rowsum(do * o) or None."""
    # out, dout and dqkv are contiguous: [tokens, heads, d] and [tokens, 3, heads, d].
    outs = (row * heads + head) * HEAD_DIM
    grads = dqkv_ptr + (row * 3 * heads + head) * HEAD_DIM
    lses = lse_ptr + row * heads + head
    out_t, grad_t, grad_g = heads * HEAD_DIM, 3 * heads * HEAD_DIM, heads * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < length
    cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
    k = load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
    v = load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start_m in range(0, length, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
        q = load_rows(base, offs_m, offs_d, stride_t, cells_m)
        do = load_rows(dout_ptr + outs, offs_m, offs_d, out_t, cells_m)
        lse = tl.load(lses + offs_m * heads, mask=mask_m, other=float("inf"))
        if delta_ptr is None:
            o = load_rows(out_ptr + outs, offs_m, offs_d, out_t, cells_m)
            delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        else:
            # Its offsets take registers of 32 bits: with 64 the loop spills.
            delta = tl.load(delta_ptr + row * heads + head + offs_m * heads, mask=mask_m, other=0.0)
        # Transposed scores [keys, queries]: padded queries get p = 0 from their infinite lse.
        s = dot(k, tl.trans(q), None, PRECISION) * scale_log2
        dp = dot(v, tl.trans(do), None, PRECISION)
        p = tl.exp2(s - lse[None, :])
        dv = dot(p.to(do.dtype), do, dv, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    ends = grads + offs_n[:, None] * grad_t + offs_d[None, :]
    tl.store(ends + grad_g, (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=cells_n)
    tl.store(ends + 2 * grad_g, dv.to(dqkv_ptr.dtype.element_ty), mask=cells_n)


@triton.jit
def store_sums(
    sums_ptr, part, head, heads, dq, do, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Part of the sums of dqkv: rows of p add up to one, those of ds to zero, so dv has do's and dk none."""
    offs_d = tl.arange(0, BLOCK_D)
    sums, mask_d = sums_ptr + (part.to(tl.int64) * 3 * heads + head) * HEAD_DIM + offs_d, offs_d < HEAD_DIM
    tl.store(sums, tl.sum(dq, 0) * scale, mask=mask_d)
    tl.store(sums + heads * HEAD_DIM, tl.zeros([BLOCK_D], tl.float32), mask=mask_d)
    tl.store(sums + 2 * heads * HEAD_DIM, tl.sum(do.to(tl.float32), 0), mask=mask_d)


@triton.jit
def queries_gradients(
    base, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, sums_ptr, part,
    row, start_m, length, head, heads, stride_t, stride_g, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of the sequence that begins at `row`.

    Perhaps also their rowsum(do * o), and a part of the sums of dqkv.
    """
    # out, dout and dqkv are contiguous: [tokens, heads, d] and [tokens, 3, heads, d].
    outs = (row * heads + head) * HEAD_DIM
    grads = dqkv_ptr + (row * 3 * heads + head) * HEAD_DIM
    lses = lse_ptr + row * heads + head
    out_t, grad_t = heads * HEAD_DIM, 3 * heads * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length
    cells_m = of_head(mask_m, HEAD_DIM, BLOCK_D)
    q = load_rows(base, offs_m, offs_d, stride_t, cells_m)
    do = load_rows(dout_ptr + outs, offs_m, offs_d, out_t, cells_m)
    o = load_rows(out_ptr + outs, offs_m, offs_d, out_t, cells_m)
    lse = tl.load(lses + offs_m * heads, mask=mask_m, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if delta_ptr is not None:
        tl.store(delta_ptr + (row + offs_m) * heads + head, delta, mask=mask_m)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, length, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        cells_n = of_head(mask_n, HEAD_DIM, BLOCK_D)
        k = load_rows(base + stride_g, offs_n, offs_d, stride_t, cells_n)
        v = load_rows(base + 2 * stride_g, offs_n, offs_d, stride_t, cells_n)
        s = dot(q, tl.trans(k), None, PRECISION) * scale_log2
        dp = dot(do, tl.trans(v), None, PRECISION)
        s = tl.where(mask_n[None, :], s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    ends = grads + offs_m[:, None] * grad_t + offs_d[None, :]
    tl.store(ends, (dq * scale).to(dqkv_ptr.dtype.element_ty), mask=cells_m)
    if sums_ptr is not None:
        store_sums(sums_ptr, part, head, heads, dq, do, scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _sequence(offsets_ptr, first_token, length, tokens, index, HAS_OFFSETS: tl.constexpr):
    """First row and length of a sequence; offsets beyond the tokens are cut."""
    row = first_token + index.to(tl.int64) * length
    if HAS_OFFSETS:
        row = tl.load(offsets_ptr + index).to(tl.int64)
        length = (tl.minimum(tl.load(offsets_ptr + index + 1).to(tl.int64), tokens) - row).to(tl.int32)
    return row, length


@launched("first_token", "length", "tokens", "heads")
def _attention_blocks_fwd_kernel(
    qkv_ptr, offsets_ptr, active_ptr, out_ptr, lse_ptr,
    first_token, length, tokens, heads,
    stride_t, stride_g, stride_h,
    scale_log2,
    HAS_OFFSETS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    row, length = _sequence(offsets_ptr, first_token, length, tokens, pid // heads, HAS_OFFSETS)
    length = length_in(active_ptr, row, head, length)
    base = qkv_ptr + row * stride_t + head * stride_h
    for start_m in range(tl.program_id(1) * BLOCK_M, length, tl.num_programs(1) * BLOCK_M):
        attend_rows(
            base, out_ptr, lse_ptr, row, start_m, length, head, heads, stride_t, stride_g,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip


@launched("first_part", "first_token", "length", "tokens", "heads")
def _attention_blocks_bwd_kernel(
    qkv_ptr, offsets_ptr, active_ptr, out_ptr, dout_ptr, lse_ptr, dqkv_ptr, sums_ptr,
    first_part, first_token, length, tokens, heads,
    stride_t, stride_g, stride_h,
    scale, scale_log2,
    HAS_OFFSETS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    head = pid % heads
    row, length = _sequence(offsets_ptr, first_token, length, tokens, pid // heads, HAS_OFFSETS)
    length = length_in(active_ptr, row, head, length)
    base = qkv_ptr + row * stride_t + head * stride_h
    for start_n in range(part * BLOCK_N, length, parts * BLOCK_N):
        keys_gradients(
            base, out_ptr, dout_ptr, lse_ptr, None, dqkv_ptr,
            row, start_n, length, head, heads, stride_t, stride_g,
            scale, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    first_part += pid // heads * tl.cdiv(length, BLOCK_M)
    for start_m in range(part * BLOCK_M, length, parts * BLOCK_M):
        queries_gradients(
            base, out_ptr, dout_ptr, lse_ptr, None, dqkv_ptr, sums_ptr, first_part + start_m // BLOCK_M,
            row, start_m, length, head, heads, stride_t, stride_g,
            scale, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip


class Span(NamedTuple):
    """Sequences of one launch.

    Attributes:
        offsets: integers `[sequences + 1]`, where each begins; None if all are equally long.
        first: token of the first.
        sequences: how many.
        length: tokens of each, or with offsets of the average one.
        active: as of `attention_fwd`.
    """

    offsets: Tensor | None
    first: int
    sequences: int
    length: int
    active: Tensor | None

    def arguments(self, qkv: Tensor, block: int) -> tuple[tuple[int, int], tuple[Any, ...]]:
        """Grid and run-time arguments of a launch whose programs own `block` rows at a time."""
        heads = qkv.shape[2]
        grid = (self.sequences * heads, max(cdiv(self.length, block), 1))
        return grid, (self.first, self.length, qkv.shape[0], heads, *qkv.stride()[:3])


def _options(qkv: Tensor, span: Span, config: AttentionConfig) -> dict[str, Any]:
    dim = qkv.shape[3]
    return {
        "HAS_OFFSETS": span.offsets is not None, "HEAD_DIM": dim, "BLOCK_D": head_block(dim),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": precision(qkv),
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def blocks_bwd(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dqkv: Tensor,
    span: Span,
    config: AttentionConfig,
    sums: Tensor | None = None,
    first_part: int = 0,
) -> None:
    """Write the gradients of some sequences into `dqkv`; sums of their blocks of queries from a part on."""
    scale = qkv.shape[3] ** -0.5
    grid, arguments = span.arguments(qkv, min(config.block_m, config.block_n))
    _attention_blocks_bwd_kernel[grid](
        qkv, span.offsets, span.active, out, dout, lse, dqkv, sums,
        first_part, *arguments,
        scale, scale * LOG2_E,
        **_options(qkv, span, config),
    )  # fmt: skip


def _span(qkv: Tensor, offsets: Tensor, active: Tensor | None) -> Span:
    count = offsets.shape[0] - 1
    return Span(offsets, 0, count, cdiv(qkv.shape[0], max(count, 1)), active)


def outputs_of(qkv: Tensor, active: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """Room for what attention gives, zeros where heads may be absent, and for its log-sum-exps if kept."""
    tokens, _, heads, dim = qkv.shape
    make = torch.empty if active is None else torch.zeros
    out = make(tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty(tokens if keep else 0, heads, dtype=torch.float32, device=qkv.device)


def attention_offsets_fwd(
    qkv: Tensor, offsets: Tensor, active: Tensor | None = None, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """As `attention_fwd`, of sequences that begin at `offsets`, contiguous integers on the same device."""
    (tokens, _, _, dim), span = qkv.shape, _span(qkv, offsets, active)
    out, lse = outputs_of(qkv, active, keep)
    if span.sequences and tokens:
        config = fwd_config(1 << 30, dim, qkv.dtype.itemsize, capability(qkv.device))
        grid, arguments = span.arguments(qkv, config.block_m)
        _attention_blocks_fwd_kernel[grid](
            qkv, offsets, active, out, lse if keep else None, *arguments, dim**-0.5 * LOG2_E,
            **_options(qkv, span, config),
        )  # fmt: skip
    return out, lse


def attention_offsets_bwd(
    qkv: Tensor, offsets: Tensor, out: Tensor, lse: Tensor, dout: Tensor, active: Tensor | None = None
) -> Tensor:
    """As `attention_bwd`, of sequences that begin at `offsets`."""
    make = torch.empty if active is None else torch.zeros
    dqkv, span = make(qkv.shape, dtype=qkv.dtype, device=qkv.device), _span(qkv, offsets, active)
    if span.sequences and qkv.shape[0]:
        config = bwd_config(1 << 30, qkv.shape[3], qkv.dtype.itemsize, capability(qkv.device))
        blocks_bwd(qkv, out, lse, dout, dqkv, span, config)
    return dqkv


register(
    "attention_offsets_fwd(Tensor qkv, Tensor offsets, Tensor? active=None, bool keep=True)"
    " -> (Tensor, Tensor)",
    attention_offsets_fwd,
    lambda qkv, offsets, active=None, keep=True: outputs_of(qkv, active, keep),
)
register(
    "attention_offsets_bwd(Tensor qkv, Tensor offsets, Tensor out, Tensor lse, Tensor dout,"
    " Tensor? active=None) -> Tensor",
    attention_offsets_bwd,
    lambda qkv, *rest: qkv.new_empty(qkv.shape),
)


class AttentionOffsetsFunction(torch.autograd.Function):
    """As `AttentionFunction`, of sequences that begin at offsets."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, offsets: Tensor, active: Tensor | None, trains: bool) -> Tensor:
        qkv = unit_stride(qkv)
        offsets, active = offsets.contiguous(), None if active is None else active.contiguous()
        out, lse = ops.attention_offsets_fwd(qkv, offsets, active, trains and ctx.needs_input_grad[0])
        ctx.save_for_backward(qkv, offsets, out, lse, active)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        *saved, active = ctx.saved_tensors
        return ops.attention_offsets_bwd(*saved, dout.contiguous(), active), None, None, None
