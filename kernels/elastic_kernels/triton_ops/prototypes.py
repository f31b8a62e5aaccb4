"""Triton kernels of cross-entropies over prototypes, without the students' logits.

    s_i = x_i W^T / tau_s,  y_j = t_j / tau + log u,  q_j = softmax(y_j),  p_i = softmax(s_i)
    ce_i = sum_{j in targets of i} lse(s_i) - <q_j, s_i>,  distill_i = lse(s2_i) - <p1_i, s2_i>
    dz1 = g1 / tau_s (n p1 - sum_j q_j),  dz2 = g2 / tau_s (n p2 - sum_j q_j) + gd / tau_s (p2 - p1)

Forward, flash style: a program holds rows of both students and goes over a range of prototypes with running
maxima and sums; teacher logits are read, student logits never written; the ranges are merged in a fixed
order. Backward makes the logits again and writes dz of a bounded range of prototypes, from which cuBLAS makes
dx and dW.

Saved for backward: x, W, the teacher's logits, and four log-sum-exps of each row. Bytes: forward reads x, W
once a row block, and the rows of t; backward the same, and writes and reads dz.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import capability, cdiv, precision, processors
from elastic_kernels.triton_ops.gemm import dot, product_into
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.losses_merge import STATS, merge
from elastic_kernels.triton_ops.registration import register
from elastic_kernels.triton_ops.sinkhorn import LN_2, LOG2_E, grow
from elastic_kernels.tuning import Tunable, power_of_2

DZ_BYTES = 256 << 20  # of the gradient of both students' logits that exists at once
DZ_SCALE = 1024.0  # dz is stored relative to the largest upstream gradient, times this: fp16 keeps its digits


@triton.jit
def _target(t_ptr, log_u, row, offs_k, mask_k, stride_t, inv_tau):
    mask = (row >= 0)[:, None] & mask_k[None, :]
    t = tl.load(t_ptr + row[:, None] * stride_t + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, t * inv_tau + log_u[None, :], float("-inf"))


@triton.jit
def _rows_of(x_ptr, offs_m, mask_m, start, dim, BLOCK_D: tl.constexpr):
    offs_d = start + tl.arange(0, BLOCK_D)
    at = offs_m.to(tl.int64)[:, None] * dim + offs_d[None, :]
    return tl.load(x_ptr + at, mask=mask_m[:, None] & (offs_d < dim)[None, :], other=0.0)


@triton.jit
def _columns_of(weight_ptr, offs_k, mask_k, start, dim, BLOCK_D: tl.constexpr):
    offs_d = start + tl.arange(0, BLOCK_D)
    at = offs_k.to(tl.int64)[None, :] * dim + offs_d[:, None]
    return tl.load(weight_ptr + at, mask=mask_k[None, :] & (offs_d < dim)[:, None], other=0.0)


@triton.jit
def _logits(
    x1_ptr, x2_ptr, x1, x2, weight_ptr, offs_m, offs_k, mask_m, mask_k, dim, inv_tau,
    TWO: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both students' logits over the temperature, prototypes read once. `WHOLE`: x1 and x2 are the rows."""
    s1, s2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if WHOLE:
        w = _columns_of(weight_ptr, offs_k, mask_k, 0, dim, BLOCK_D)
        s1 = dot(x1, w, s1, PRECISION)
        if TWO:
            s2 = dot(x2, w, s2, PRECISION)
    else:
        for start in range(0, dim, BLOCK_D):
            w = _columns_of(weight_ptr, offs_k, mask_k, start, dim, BLOCK_D)
            s1 = dot(_rows_of(x1_ptr, offs_m, mask_m, start, dim, BLOCK_D), w, s1, PRECISION)
            if TWO:
                s2 = dot(_rows_of(x2_ptr, offs_m, mask_m, start, dim, BLOCK_D), w, s2, PRECISION)
    return s1 * inv_tau, s2 * inv_tau


@triton.jit
def _store_statistics(
    out, mask_m, rows,
    m1, z1, m2, z2, ma, za, a1, a2, mb, zb, b1, b2, across,
    TWO: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    tl.store(out, m1, mask=mask_m)
    tl.store(out + rows, z1, mask=mask_m)
    tl.store(out + 4 * rows, ma, mask=mask_m)
    tl.store(out + 5 * rows, za, mask=mask_m)
    tl.store(out + 6 * rows, a1, mask=mask_m)
    if TWO:
        tl.store(out + 2 * rows, m2, mask=mask_m)
        tl.store(out + 3 * rows, z2, mask=mask_m)
        tl.store(out + 7 * rows, a2, mask=mask_m)
        tl.store(out + 12 * rows, across, mask=mask_m)
    if TARGETS == 2:
        tl.store(out + 8 * rows, mb, mask=mask_m)
        tl.store(out + 9 * rows, zb, mask=mask_m)
        tl.store(out + 10 * rows, b1, mask=mask_m)
        if TWO:
            tl.store(out + 11 * rows, b2, mask=mask_m)


@launched("rows", "span", "inv_tau_s", "inv_tau_t")
def _losses_fwd_kernel(
    x1_ptr, x2_ptr, weight_ptr, t_ptr, log_u_ptr, index_ptr, stats_ptr,
    rows, prototypes, span, dim,
    stride_t,
    inv_tau_s, inv_tau_t,
    TWO: tl.constexpr, TARGETS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics of a range of prototypes; `inv_tau_s` and `inv_tau_t` times log2(e), as powers are of 2."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    row_a = tl.load(index_ptr + TARGETS * offs_m, mask=mask_m, other=-1)
    row_b = row_a
    if TARGETS == 2:
        row_b = tl.load(index_ptr + 2 * offs_m + 1, mask=mask_m, other=-1)
    x1 = _rows_of(x1_ptr, offs_m, mask_m, 0, dim, BLOCK_D)
    x2 = x1
    if TWO:
        x2 = _rows_of(x2_ptr, offs_m, mask_m, 0, dim, BLOCK_D)
    m1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    ma = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mb = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z1 = tl.zeros([BLOCK_M], tl.float32)
    z2 = tl.zeros([BLOCK_M], tl.float32)
    za = tl.zeros([BLOCK_M], tl.float32)
    zb = tl.zeros([BLOCK_M], tl.float32)
    a1 = tl.zeros([BLOCK_M], tl.float32)
    a2 = tl.zeros([BLOCK_M], tl.float32)
    b1 = tl.zeros([BLOCK_M], tl.float32)
    b2 = tl.zeros([BLOCK_M], tl.float32)
    across = tl.zeros([BLOCK_M], tl.float32)
    first = tl.multiple_of(tl.program_id(1) * span, BLOCK_N)
    for start in tl.range(first, tl.minimum(first + span, prototypes), BLOCK_N, num_stages=STAGES):
        offs_k = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        mask_k = offs_k < prototypes
        log_u = tl.load(log_u_ptr + offs_k, mask=mask_k, other=0.0) * LOG2_E
        ya = _target(t_ptr, log_u, row_a, offs_k, mask_k, stride_t, inv_tau_t)
        s1, s2 = _logits(
            x1_ptr, x2_ptr, x1, x2, weight_ptr, offs_m, offs_k, mask_m, mask_k, dim, inv_tau_s,
            TWO, WHOLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        ma, za, ea, shrink_a = grow(ma, za, ya)
        a1 = a1 * shrink_a + tl.sum(ea * s1, 1)
        if TWO:
            a2 = a2 * shrink_a + tl.sum(ea * s2, 1)
        if TARGETS == 2:
            yb = _target(t_ptr, log_u, row_b, offs_k, mask_k, stride_t, inv_tau_t)
            mb, zb, eb, shrink_b = grow(mb, zb, yb)
            b1 = b1 * shrink_b + tl.sum(eb * s1, 1)
            if TWO:
                b2 = b2 * shrink_b + tl.sum(eb * s2, 1)
        m1, z1, e1, shrink_1 = grow(m1, z1, tl.where(mask_k[None, :], s1, float("-inf")))
        if TWO:
            across = across * shrink_1 + tl.sum(e1 * s2, 1)
            m2, z2, _, _ = grow(m2, z2, tl.where(mask_k[None, :], s2, float("-inf")))
    _store_statistics(
        stats_ptr + tl.program_id(1).to(tl.int64) * 13 * rows + offs_m, mask_m, rows,
        m1, z1, m2, z2, ma, za, a1, a2, mb, zb, b1, b2, across, TWO, TARGETS,
    )  # fmt: skip


@triton.jit
def _probabilities(y, lse_ptr, offs_m, mask, rows):
    """2^(y - lse), the log-sum-exp in two parts, maximum and the rest, which keeps the digits of both."""
    m = tl.load(lse_ptr + offs_m, mask=mask, other=0.0)
    rest = tl.load(lse_ptr + 4 * rows + offs_m, mask=mask, other=0.0)
    return tl.exp2((y - m[:, None]) - rest[:, None])


@launched("rows", "first", "columns", "stride_g", "inv_tau_s", "inv_tau_t")
def _losses_bwd_kernel(
    x1_ptr, x2_ptr, weight_ptr, t_ptr, log_u_ptr, index_ptr, lse_ptr, grad_ptr, largest_ptr, dz1_ptr, dz2_ptr,
    rows, prototypes, first, columns, dim,
    stride_t, stride_g,
    inv_tau_s, inv_tau_t, dz_scale,
    TWO: tl.constexpr, FIRST: tl.constexpr, TARGETS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz of `columns * COLUMNS` prototypes from `first * 128` on, times `dz_scale` / the largest gradient.

    Without FIRST, the first student's loss has no gradient.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = first * 128 + offs_c
    width = columns * COLUMNS
    mask_m, mask_k = offs_m < rows, (offs_c < width) & (offs_k < prototypes)
    log_u = tl.load(log_u_ptr + offs_k, mask=mask_k, other=0.0) * LOG2_E
    row_a = tl.load(index_ptr + TARGETS * offs_m, mask=mask_m, other=-1)
    ya = _target(t_ptr, log_u, row_a, offs_k, mask_k, stride_t, inv_tau_t)
    s1, s2 = _logits(
        x1_ptr, x2_ptr, None, None, weight_ptr, offs_m, offs_k, mask_m, mask_k, dim, inv_tau_s,
        TWO, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    q = _probabilities(ya, lse_ptr + 2 * rows, offs_m, (row_a >= 0) & mask_m, rows)
    count = (row_a >= 0).to(tl.float32)
    if TARGETS == 2:
        row_b = tl.load(index_ptr + 2 * offs_m + 1, mask=mask_m, other=-1)
        yb = _target(t_ptr, log_u, row_b, offs_k, mask_k, stride_t, inv_tau_t)
        q += _probabilities(yb, lse_ptr + 3 * rows, offs_m, (row_b >= 0) & mask_m, rows)
        count += (row_b >= 0).to(tl.float32)
    factor = inv_tau_s * LN_2 * dz_scale / tl.maximum(tl.load(largest_ptr), 1e-30)
    p1 = _probabilities(s1, lse_ptr, offs_m, mask_m, rows)
    out = offs_m.to(tl.int64)[:, None] * width + offs_c[None, :]
    mask = mask_m[:, None] & mask_k[None, :]
    grad_ptr += offs_m
    if FIRST:
        g1 = tl.load(grad_ptr, mask=mask_m, other=0.0) * factor
        dz1 = g1[:, None] * (count[:, None] * p1 - q)
        tl.store(dz1_ptr + out, dz1.to(dz1_ptr.dtype.element_ty), mask=mask)
        grad_ptr += stride_g
    if TWO:
        g2 = tl.load(grad_ptr, mask=mask_m, other=0.0) * factor
        gd = tl.load(grad_ptr + stride_g, mask=mask_m, other=0.0) * factor
        p2 = _probabilities(s2, lse_ptr + rows, offs_m, mask_m, rows)
        dz2 = g2[:, None] * (count[:, None] * p2 - q) + gd[:, None] * (p2 - p1)
        tl.store(dz2_ptr + out, dz2.to(dz2_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class LossConfig:
    """Launch settings: rows of a program, prototypes and channels of a step."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


# Not timed on a GPU yet. Of the settings that compile without spilling, those that `benchmarks predict`
# finds fastest. Running sums of two students with two targets take most registers.
_FP32 = LossConfig(32, 32, 32, warps=8, stages=1)
_FWD = LossConfig(64, 32, 64, warps=4, stages=3)
_FWD_WHOLE = LossConfig(64, 32, 256, warps=4, stages=2)  # rows stay in shared memory
_BWD = LossConfig(32, 64, 64, warps=8, stages=2)
_BWD_WARP_GROUP = LossConfig(64, 64, 64, warps=4, stages=3)  # where matrix units read shared memory


def fwd_config(itemsize: int, dim: int, capability: tuple[int, int]) -> LossConfig:
    """Settings of the forward for rows of `dim` channels, on a GPU of a compute capability."""
    if itemsize == 4:
        return _FP32
    whole = _FWD.block_d < dim <= _FWD_WHOLE.block_d and capability[0] in (9, 10)
    return _FWD_WHOLE if whole else _FWD


def bwd_config(itemsize: int, capability: tuple[int, int]) -> LossConfig:
    if itemsize == 4:
        return _FP32
    return _BWD_WARP_GROUP if capability[0] in (9, 10) else _BWD


_FWD_CANDIDATES = (
    _FWD,
    _FWD_WHOLE,
    LossConfig(32, 64, 64, warps=4, stages=2),
    LossConfig(64, 16, 256, warps=4, stages=3),
    LossConfig(64, 64, 256, warps=8, stages=2),
)
_BWD_CANDIDATES = (
    _BWD,
    _BWD_WARP_GROUP,
    LossConfig(64, 64, 64, warps=8, stages=3),
    LossConfig(64, 64, 128, warps=8, stages=2),
    LossConfig(64, 32, 64, warps=4, stages=3),
    LossConfig(128, 128, 64, warps=8, stages=3),
)
_FWD_TUNABLE = Tunable("losses_fwd", lambda *shape: _FWD_CANDIDATES)
_BWD_TUNABLE = Tunable("losses_bwd", lambda *shape: _BWD_CANDIDATES)


def _config(tunable: Tunable, fallback: LossConfig, x: Tensor, weight: Tensor) -> LossConfig:
    """Settings for rows like those of `x` and these prototypes; exact products keep the fallback."""
    if x.dtype.itemsize == 4:
        return fallback
    return tunable.choose(x, (power_of_2(x.shape[0]), *weight.shape), fallback)


def _launch_options(config: LossConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def prototype_losses_fwd(
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    log_u: Tensor,
    index: Tensor,
    tau_s: float,
    tau_t: float,
    losses: Tensor,
    keep: bool = True,
) -> Tensor:
    """Write the losses, and return the log-sum-exps, as `merge`, of `x` `[students, rows, dim]`."""
    (students, rows, _), (prototypes, dim) = x.shape, weight.shape
    fallback = fwd_config(x.dtype.itemsize, dim, capability(x.device))
    config = _config(_FWD_TUNABLE, fallback, x[0], weight)
    whole = dim <= config.block_d
    blocks = cdiv(rows, config.block_m)
    programs = (3 if whole and students == 1 else 2) * processors(x.device)  # that run at once
    ranges = max(min(programs // max(blocks, 1), cdiv(prototypes, 4 * config.block_n)), 1)
    span = cdiv(cdiv(prototypes, ranges), config.block_n) * config.block_n
    ranges = cdiv(prototypes, span)
    stats = torch.empty(ranges, STATS, rows, dtype=torch.float32, device=x.device)
    if rows:
        _losses_fwd_kernel[(blocks, ranges)](
            x[0], x[-1], weight, t, log_u, index, stats,
            rows, prototypes, span, dim,
            t.stride(0),
            LOG2_E.value / tau_s, LOG2_E.value / tau_t,
            TWO=students == 2, TARGETS=index.shape[1], WHOLE=whole, PRECISION=precision(x),
            STAGES=config.stages if whole else 1,
            **_launch_options(config),
        )  # fmt: skip
    return merge(stats, index, students, losses, keep)


def prototype_losses_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    t: list[Tensor],
    log_u: list[Tensor],
    index: list[Tensor],
    lse: list[Tensor],
    largest: Tensor,
    tau_s: float,
    tau_t: float,
    dx: Tensor,
    dweight: Tensor,
) -> None:
    """Write gradients of x and weight for `grad` of the losses, divided by `largest`: fp32.

    Rows of `x` `[students, rows, dim]` are those of the parts, one after the other. Of two students `grad` is
    `[3, rows]`, or `[2, rows]` if the first one's loss has none; then `dx` is of the second alone.
    """
    (_, rows, _), (prototypes, dim) = x.shape, weight.shape
    learners = x[-len(dx) :].flatten(0, 1)
    width = min(dz_prototypes(rows, len(dx), x.dtype.itemsize), prototypes)
    dz = torch.empty(len(learners) * width, dtype=x.dtype, device=x.device)
    for start in range(0, prototypes, width):
        count = min(width, prototypes - start)
        unit = 16 if count % 16 == 0 else 1  # tells the compiler that rows of dz are aligned
        of_rows = dz[: len(learners) * count].view(len(dx), rows, count)
        counts = [len(targets) for targets in index]
        split = (tensor.split(counts, 1) for tensor in (x, of_rows, grad))
        for x_of, dz_of, g, logits, scaling, targets, sums in zip(*split, t, log_u, index, lse, strict=True):
            if not len(targets):
                continue
            fallback = bwd_config(x.dtype.itemsize, capability(x.device))
            config = _config(_BWD_TUNABLE, fallback, x_of[0], weight)
            grid = cdiv(len(targets), config.block_m), cdiv(count, config.block_n)
            _losses_bwd_kernel[grid](
                x_of[0], x_of[-1], weight, logits, scaling, targets, sums, g, largest, dz_of[0], dz_of[-1],
                len(targets), prototypes, start // 128, count // unit, dim,
                logits.stride(0), grad.stride(0),
                LOG2_E.value / tau_s, LOG2_E.value / tau_t, DZ_SCALE,
                TWO=len(x) == 2, FIRST=len(grad) != 2, TARGETS=targets.shape[1], COLUMNS=unit,
                PRECISION=precision(x), **_launch_options(config),
            )  # fmt: skip
        columns, of_rows = slice(start, start + count), of_rows.flatten(0, 1)
        product_into(dx.flatten(0, 1), of_rows, weight[columns], scale=1 / DZ_SCALE, add=start > 0)
        product_into(dweight[columns], of_rows.t(), learners, scale=1 / DZ_SCALE)


def dz_prototypes(rows: int, students: int, itemsize: int) -> int:
    """Prototypes whose dz exists at once: within `DZ_BYTES`, a multiple of 128."""
    return max(DZ_BYTES // (max(rows, 1) * students * itemsize) // 128 * 128, 128)


register(
    "prototype_losses_fwd(Tensor x, Tensor weight, Tensor t, Tensor log_u, Tensor index,"
    " float tau_s, float tau_t, Tensor(a!) losses, bool keep=True) -> Tensor",
    prototype_losses_fwd,
    lambda x, weight, t, log_u, index, tau_s, tau_t, losses, keep=True: x.new_empty(
        8 if keep else 0, x.shape[1], dtype=torch.float32
    ),
)
register(
    "prototype_losses_bwd(Tensor grad, Tensor x, Tensor weight, Tensor[] t, Tensor[] log_u, Tensor[] index,"
    " Tensor[] lse, Tensor largest, float tau_s, float tau_t, Tensor(a!) dx, Tensor(b!) dweight) -> ()",
    prototype_losses_bwd,
)
