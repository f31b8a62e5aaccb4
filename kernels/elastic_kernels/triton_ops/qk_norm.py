"""Triton kernels of what queries and keys pass before attention: norms, and a rotary embedding.

    n = (x - mean) rstd w + b,  x rstd w,  or x         each head of q and of k; statistics over its channels
    y = n cos + rotate(n) sin                           pairs of channels, turned by the angle of their token

One pass each way. Values are copied beside, so that attention reads one tensor. A program owns a token's
heads of q, k or v, and reads its angles once. Saved for backward: qkv, and the angles; statistics are made
again. Bytes: forward reads and writes 3 of tokens * channels elements; backward reads 3, or 5 with norms, and
writes 3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import processors, unit_stride
from elastic_kernels.triton_ops.heads import head_block
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.layer_norm import PROGRAMS_PER_SM
from elastic_kernels.triton_ops.registration import first_order, ops, register

FWD_TILE, BWD_TILE = 1024, 512  # elements: twice that spills in the backward; not timed on a GPU yet


@triton.jit
def _load_pairs(base, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Both members of the pairs of channels of rows, fp32 `[rows, BLOCK_D / 2]`; 0 beyond the head."""
    if HALVES:
        offs_d = tl.arange(0, BLOCK_D // 2)
        mask = mask & (offs_d < HEAD_DIM // 2)[None, :]
        a = tl.load(base + offs_d[None, :], mask=mask, other=0.0)
        b = tl.load(base + HEAD_DIM // 2 + offs_d[None, :], mask=mask, other=0.0)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        x = tl.load(base + offs_d[None, :], mask=mask & (offs_d < HEAD_DIM)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK_D // 2, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(base, a, b, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    kind = base.dtype.element_ty
    if HALVES:
        offs_d = tl.arange(0, BLOCK_D // 2)
        mask = mask & (offs_d < HEAD_DIM // 2)[None, :]
        tl.store(base + offs_d[None, :], a.to(kind), mask=mask)
        tl.store(base + HEAD_DIM // 2 + offs_d[None, :], b.to(kind), mask=mask)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        x = tl.reshape(tl.join(a, b), [a.shape[0], BLOCK_D])
        tl.store(base + offs_d[None, :], x.to(kind), mask=mask & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def _normalised(a, b, eps, CENTRED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    if CENTRED:
        inside = (tl.arange(0, BLOCK_D // 2) < HEAD_DIM // 2)[None, :]
        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / HEAD_DIM)[:, None]
        a, b = tl.where(inside, a - mean, 0.0), tl.where(inside, b - mean, 0.0)
    rstd = 1 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
    return a * rstd, b * rstd, rstd


@launched("heads")
def _qk_norm_fwd_kernel(
    qkv_ptr, weight_ptr, bias_ptr, sin_ptr, cos_ptr, y_ptr,
    heads,
    stride_t, stride_g, stride_h,
    eps,
    CENTRED: tl.constexpr, HALVES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    every = tl.full([1, 1], 1, tl.int1)
    base = qkv_ptr + token * stride_t + group * stride_g
    out = y_ptr + (token * 3 + group) * heads * HEAD_DIM
    for start in range(0, heads, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)[:, None]
        mask = offs_h < heads
        a, b = _load_pairs(base + offs_h * stride_h, mask, HEAD_DIM, BLOCK_D, HALVES)
        if group < 2:
            if weight_ptr is not None:
                a, b, _ = _normalised(a, b, eps, CENTRED, HEAD_DIM, BLOCK_D)
                wa, wb = _load_pairs(weight_ptr + group * HEAD_DIM, every, HEAD_DIM, BLOCK_D, HALVES)
                a, b = a * wa, b * wb
                if bias_ptr is not None:
                    wa, wb = _load_pairs(bias_ptr + group * HEAD_DIM, every, HEAD_DIM, BLOCK_D, HALVES)
                    a, b = a + wa, b + wb
            if sin_ptr is not None:
                sa, sb = _load_pairs(sin_ptr + token * HEAD_DIM, every, HEAD_DIM, BLOCK_D, HALVES)
                ca, cb = _load_pairs(cos_ptr + token * HEAD_DIM, every, HEAD_DIM, BLOCK_D, HALVES)
                a, b = a * ca - b * sa, b * cb + a * sb
        _store_pairs(out + offs_h * HEAD_DIM, a, b, mask, HEAD_DIM, BLOCK_D, HALVES)


@launched("tokens", "heads")
def _qk_norm_bwd_kernel(
    dy_ptr, qkv_ptr, weight_ptr, sin_ptr, cos_ptr, dqkv_ptr, partials_ptr,
    tokens, heads,
    stride_t, stride_g, stride_h,
    eps,
    CENTRED: tl.constexpr, HALVES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    program, group, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    every = tl.full([1, 1], 1, tl.int1)
    dwa, dwb, dba, dbb = (tl.zeros([1, BLOCK_D // 2], tl.float32),) * 4
    for token in range(program, tokens, programs):
        row = tl.zeros([1, 1], tl.int64) + token
        place = (row * 3 + group) * heads * HEAD_DIM
        base = qkv_ptr + row * stride_t + group * stride_g
        for start in range(0, heads, BLOCK_H):
            offs_h = start + tl.arange(0, BLOCK_H)[:, None]
            mask = offs_h < heads
            a, b = _load_pairs(dy_ptr + place + offs_h * HEAD_DIM, mask, HEAD_DIM, BLOCK_D, HALVES)
            if group < 2:
                if sin_ptr is not None:
                    sa, sb = _load_pairs(sin_ptr + row * HEAD_DIM, every, HEAD_DIM, BLOCK_D, HALVES)
                    ca, cb = _load_pairs(cos_ptr + row * HEAD_DIM, every, HEAD_DIM, BLOCK_D, HALVES)
                    a, b = a * ca + b * sb, b * cb - a * sa
                if weight_ptr is not None:
                    xa, xb = _load_pairs(base + offs_h * stride_h, mask, HEAD_DIM, BLOCK_D, HALVES)
                    xa, xb, rstd = _normalised(xa, xb, eps, CENTRED, HEAD_DIM, BLOCK_D)
                    dwa += tl.sum(a * xa, 0)[None, :]
                    dwb += tl.sum(b * xb, 0)[None, :]
                    dba += tl.sum(a, 0)[None, :]
                    dbb += tl.sum(b, 0)[None, :]
                    wa, wb = _load_pairs(weight_ptr + group * HEAD_DIM, every, HEAD_DIM, BLOCK_D, HALVES)
                    a, b = a * wa, b * wb
                    along = ((tl.sum(a * xa, 1) + tl.sum(b * xb, 1)) / HEAD_DIM)[:, None]
                    if CENTRED:
                        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / HEAD_DIM)[:, None]
                        a, b = a - mean, b - mean
                    a, b = (a - xa * along) * rstd, (b - xb * along) * rstd
            _store_pairs(dqkv_ptr + place + offs_h * HEAD_DIM, a, b, mask, HEAD_DIM, BLOCK_D, HALVES)
    if weight_ptr is not None:
        partials = partials_ptr + (program * 6 + group * 2) * HEAD_DIM
        _store_pairs(partials, dwa, dwb, every, HEAD_DIM, BLOCK_D, HALVES)
        _store_pairs(partials + HEAD_DIM, dba, dbb, every, HEAD_DIM, BLOCK_D, HALVES)


def _options(qkv: Tensor, tile: int, centred: bool, halves: bool) -> dict[str, Any]:
    dim = qkv.shape[3]
    block = head_block(dim)
    options = {"HEAD_DIM": dim, "BLOCK_D": block, "BLOCK_H": max(tile // block, 1)}
    return {"CENTRED": centred, "HALVES": halves, **options}


def qk_norm_fwd(
    qkv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    eps: float,
    halves: bool,
) -> Tensor:
    """Norm and turn queries and keys, and copy values.

    Args:
        qkv: `[tokens, 3, heads, d]`, unit stride of channels.
        weight, bias: `[2, d]` of queries and keys, contiguous; a LayerNorm has a bias, an RMSNorm has none;
            without a weight there is no norm.
        sin, cos: `[tokens, d]`, contiguous, or None for no embedding.
        eps: of the norms.
        halves: pairs are (i, i + d / 2), not neighbours.

    Returns:
        `[tokens, 3, heads, d]`, contiguous.
    """
    y = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.shape[0]:
        _qk_norm_fwd_kernel[(qkv.shape[0], 3)](
            qkv, weight, bias, sin, cos, y,
            qkv.shape[2],
            *qkv.stride()[:3],
            eps,
            **_options(qkv, FWD_TILE, bias is not None, halves),
        )  # fmt: skip
    return y


def qk_norm_bwd(
    dy: Tensor,
    qkv: Tensor,
    weight: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    eps: float,
    halves: bool,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and fp32 `[2, 2, d]` of weight and bias of q and of k (empty without a norm)."""
    tokens, _, heads, dim = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    programs = min(tokens, PROGRAMS_PER_SM * processors(qkv.device))
    partials = torch.empty(
        programs, 3, 2, 0 if weight is None else dim, dtype=torch.float32, device=qkv.device
    )
    if tokens:
        _qk_norm_bwd_kernel[(programs, 3)](
            dy, qkv, weight, sin, cos, dqkv, partials,
            tokens, heads,
            *qkv.stride()[:3],
            eps,
            **_options(qkv, BWD_TILE, centred, halves),
        )  # fmt: skip
    return dqkv, partials[:, :2].sum(0)


register(
    "qk_norm_fwd(Tensor qkv, Tensor? weight, Tensor? bias, Tensor? sin, Tensor? cos, float eps, bool halves)"
    " -> Tensor",
    qk_norm_fwd,
    lambda qkv, *rest: qkv.new_empty(qkv.shape),
)
register(
    "qk_norm_bwd(Tensor dy, Tensor qkv, Tensor? weight, Tensor? sin, Tensor? cos, float eps, bool halves,"
    " bool centred) -> (Tensor, Tensor)",
    qk_norm_bwd,
    lambda dy, qkv, weight, *rest: (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(2, 2, 0 if weight is None else qkv.shape[3], dtype=torch.float32),
    ),
)


class QkNormFunction(torch.autograd.Function):
    """Norms and rotary embedding of queries and keys; angles have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sin: Tensor | None,
        cos: Tensor | None,
        eps: float,
        halves: bool,
    ) -> Tensor:
        qkv = unit_stride(qkv)
        weight, bias = (None if affine is None else affine.contiguous() for affine in (weight, bias))
        ctx.save_for_backward(qkv, weight, sin, cos)
        ctx.options = (eps, halves, bias is not None)
        return ops.qk_norm_fwd(qkv, weight, bias, sin, cos, eps, halves)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weight, sin, cos = ctx.saved_tensors
        dqkv, affine = ops.qk_norm_bwd(dy.contiguous(), qkv, weight, sin, cos, *ctx.options)
        dweight = dbias = None
        if weight is not None:
            dweight, dbias = affine.to(weight.dtype).unbind(1)
        return dqkv, dweight, dbias if ctx.options[2] else None, None, None, None, None
