"""Triton kernels of windowed attention: one program owns a window and a head, or a head of many windows.

    s = scale * q k^T + bias + region,  p = softmax(s),  o = p v
    dp = do v^T,  ds = p * (dp - rowsum(p * dp)),  dq = scale * ds k,  dk = scale * ds^T q,  dv = p^T do
    dbias = sum ds

Cutting a map into windows, its padding and its shift are arithmetic on addresses: tokens are read and written
where they lie. The bias of a head is made a tile first, in powers of 2 and minus infinity at keys beyond the
window, which is loaded by 16 bytes and without a mask. A program of the backward goes over a slice of the
windows with one head and keeps partial gradients of the bias, and of k and v of padded positions, in
registers; partial sums are added in a fixed order.

Saved for backward: qkv, the tiles and the fp32 log-sum-exp of each row; a window's row of p is whole in a
tile, so o is not needed. Bytes: forward reads 3 and writes 1 of tokens * channels elements; backward reads 4
(qkv, do), writes 3, and slices * heads * window**4 * 4 bytes of partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.attention_blocks import LOG2_E, outputs_of
from elastic_kernels.triton_ops.device import capability, cdiv, next_power_of_2, precision, unit_stride
from elastic_kernels.triton_ops.gemm import dot
from elastic_kernels.triton_ops.heads import head_block, load_head, of_head
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import first_order, ops, register
from elastic_kernels.tuning import Tunable

SLICED_PROGRAMS = 1024  # of the backward of a group, about: some to each multiprocessor, few partial sums


@triton.jit
def _places(window, height, width, rows, columns, shift, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a window's positions: the token, from the group's first one; whether there is one; the region."""
    offs = tl.arange(0, BLOCK)
    across = columns // SIDE
    each = across * (rows // SIDE)
    y = (window % each) // across * SIDE + offs // SIDE
    x = window % across * SIDE + offs % SIDE
    source_y, source_x = (y + shift) % rows, (x + shift) % columns
    real = (offs < SIDE * SIDE) & (source_y < height) & (source_x < width)
    token = ((window // each).to(tl.int64) * height + source_y) * width + source_x
    down = (y >= rows - SIDE).to(tl.int32) + (y >= rows - shift).to(tl.int32)
    right = (x >= columns - SIDE).to(tl.int32) + (x >= columns - shift).to(tl.int32)
    return token, real, 3 * down + right


@triton.jit
def _load_padded(base, pad, token, real, inside, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """k or v `[BLOCK, BLOCK_D]`: of tokens, of padded positions, and zeros beyond the window and the head."""
    mask = of_head(real, HEAD_DIM, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)
    x = tl.load(base + token[:, None] * stride_t + offs_d[None, :], mask=mask, other=0.0)
    row = load_head(pad, HEAD_DIM, BLOCK_D)
    filled = tl.where(inside[:, None], row[None, :], 0.0).to(x.dtype)
    return tl.where(real[:, None], x, filled)


@triton.jit
def _scores(
    q, k, tiles_ptr, head, region, scale_log2,
    BLOCK: tl.constexpr, MASK_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    bias = tl.load(tiles_ptr + head * BLOCK * BLOCK + offs[:, None] * BLOCK + offs[None, :])
    s = dot(q, tl.trans(k), None, PRECISION) * scale_log2 + bias
    return s + tl.where(region[:, None] == region[None, :], 0.0, MASK_VALUE)


@launched("stride_h", "stride_q", "stride_k")
def _window_bias_tiles_kernel(
    bias_ptr, tiles_ptr,
    stride_h, stride_q, stride_k,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    head, offs = tl.program_id(0), tl.arange(0, BLOCK)
    inside = offs < SIDE * SIDE
    places = bias_ptr + head * stride_h + offs[:, None] * stride_q + offs[None, :] * stride_k
    bias = tl.load(places, mask=inside[:, None] & inside[None, :], other=0.0).to(tl.float32) * LOG2
    tile = tl.where(inside[None, :], bias, float("-inf"))
    tl.store(tiles_ptr + head * BLOCK * BLOCK + offs[:, None] * BLOCK + offs[None, :], tile)


@launched("first_token", "height", "width", "rows", "columns", "shift", "heads")
def _window_attention_fwd_kernel(
    qkv_ptr, tiles_ptr, pad_ptr, out_ptr, lse_ptr,
    first_token, height, width, rows, columns, shift, heads,
    stride_t, stride_g, stride_h, stride_pad,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
    MASK_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head, window = pid % heads, pid // heads
    token, real, region = _places(window, height, width, rows, columns, shift, SIDE, BLOCK)
    token += first_token
    inside, offs_d = tl.arange(0, BLOCK) < SIDE * SIDE, tl.arange(0, BLOCK_D)
    base, pad = qkv_ptr + head * stride_h, pad_ptr + head * HEAD_DIM
    mask = of_head(real, HEAD_DIM, BLOCK_D)
    q = tl.load(base + token[:, None] * stride_t + offs_d[None, :], mask=mask, other=0.0)
    k = _load_padded(base + stride_g, pad + stride_pad, token, real, inside, stride_t, HEAD_DIM, BLOCK_D)
    v = _load_padded(
        base + 2 * stride_g, pad + 2 * stride_pad, token, real, inside, stride_t, HEAD_DIM, BLOCK_D
    )
    s = _scores(q, k, tiles_ptr, head, region, scale_log2, BLOCK, MASK_VALUE, PRECISION)
    m = tl.max(s, 1)
    p = tl.exp2(s - m[:, None])
    z = tl.sum(p, 1)
    o = dot(p.to(v.dtype), v, None, PRECISION) / z[:, None]
    outs = out_ptr + (token[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
    tl.store(outs, o.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + token * heads + head, m + tl.log2(z), mask=real)


@triton.jit(
    do_not_specialize=[
        "first_token",
        "height",
        "width",
        "rows",
        "columns",
        "shift",
        "heads",
        "windows",
        "first_partial",
    ]
)
def _window_attention_bwd_kernel(
    qkv_ptr, tiles_ptr, pad_ptr, dout_ptr, lse_ptr, dqkv_ptr, dbias_ptr, dpad_ptr,
    first_token, height, width, rows, columns, shift, heads, windows, first_partial,
    stride_t, stride_g, stride_h, stride_pad,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
    MASK_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, piece = tl.program_id(0), tl.program_id(1)
    offs, offs_d, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D), SIDE * SIDE
    inside = offs < n
    base, pad = qkv_ptr + head * stride_h, pad_ptr + head * HEAD_DIM
    dbias = tl.zeros([BLOCK, BLOCK], tl.float32)
    dpad_k, dpad_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for window in range(piece, windows, tl.num_programs(1)):
        token, real, region = _places(window, height, width, rows, columns, shift, SIDE, BLOCK)
        token += first_token
        mask = of_head(real, HEAD_DIM, BLOCK_D)
        q = tl.load(base + token[:, None] * stride_t + offs_d[None, :], mask=mask, other=0.0)
        k = _load_padded(base + stride_g, pad + stride_pad, token, real, inside, stride_t, HEAD_DIM, BLOCK_D)
        v = _load_padded(
            base + 2 * stride_g, pad + 2 * stride_pad, token, real, inside, stride_t, HEAD_DIM, BLOCK_D
        )
        outs = (token[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
        do = tl.load(dout_ptr + outs, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + token * heads + head, mask=real, other=float("inf"))
        s = _scores(q, k, tiles_ptr, head, region, scale_log2, BLOCK, MASK_VALUE, PRECISION)
        p = tl.exp2(s - lse[:, None])  # padded queries get 0 from their infinite lse
        dv = dot(tl.trans(p.to(do.dtype)), do, None, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        dbias += ds
        dk = dot(tl.trans(ds.to(q.dtype)), q, None, PRECISION) * scale
        dq = dot(ds.to(k.dtype), k, None, PRECISION) * scale
        grads = dqkv_ptr + (token[:, None] * 3 * heads + head) * HEAD_DIM + offs_d[None, :]
        tl.store(grads, dq.to(dqkv_ptr.dtype.element_ty), mask=mask)
        tl.store(grads + heads * HEAD_DIM, dk.to(dqkv_ptr.dtype.element_ty), mask=mask)
        tl.store(grads + 2 * heads * HEAD_DIM, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)
        padded = (inside & ~real)[:, None]
        dpad_k += tl.sum(tl.where(padded, dk, 0.0), 0)
        dpad_v += tl.sum(tl.where(padded, dv, 0.0), 0)
    partial = (first_partial + piece).to(tl.int64) * heads + head
    places = dbias_ptr + partial * n * n + offs[:, None] * n + offs[None, :]
    tl.store(places, dbias, mask=inside[:, None] & inside[None, :])
    tl.store(dpad_ptr + partial * 2 * BLOCK_D + offs_d, dpad_k)
    tl.store(dpad_ptr + (partial * 2 + 1) * BLOCK_D + offs_d, dpad_v)


@dataclass(frozen=True)
class _Span:
    """A group's first token, windows and sizes as the kernels take them, and the slices of its backward."""

    first: int
    windows: int
    slices: int
    sizes: tuple[int, int, int, int]


def _spans(maps: Sequence[int], side: int, heads: int) -> list[_Span]:
    """Of each group that has tokens; maps are flat triples of count, height and width."""
    spans, first = [], 0
    for count, height, width in zip(maps[::3], maps[1::3], maps[2::3], strict=True):
        rows, columns = (cdiv(length, side) * side for length in (height, width))
        windows = count * (rows // side) * (columns // side)
        if windows:
            slices = min(windows, max(SLICED_PROGRAMS // heads, 1))
            spans.append(_Span(first, windows, slices, (height, width, rows, columns)))
        first += count * height * width
    return spans


def window_block(side: int) -> int:
    """Rows of the tile of a window."""
    return max(next_power_of_2(side * side), 16)


def window_warps(side: int, itemsize: int, backward: bool, part: tuple[int, int]) -> int:
    """Warps of a kernel on a GPU of a compute capability; not timed on a GPU yet.

    The fewest that do not spill: in half precision eight compute the rows of a tile twice, but on sm_100.
    """
    eight = itemsize == 4 or (backward and part[0] == 10)
    return 8 if window_block(side) > 32 and eight else 4


@dataclass(frozen=True)
class WindowConfig:
    """Launch settings: the tile is the window."""

    warps: int


_CANDIDATES = tuple(WindowConfig(warps) for warps in (2, 4, 8))
_FWD, _BWD = (Tunable(f"window_attention_{way}", lambda *shape: _CANDIDATES) for way in ("fwd", "bwd"))


def _warps(qkv: Tensor, side: int, backward: bool) -> int:
    """Warps for windows of `qkv`; exact products keep the fallback."""
    fallback = WindowConfig(window_warps(side, qkv.dtype.itemsize, backward, capability(qkv.device)))
    if qkv.dtype.itemsize == 4:
        return fallback.warps
    return (_BWD if backward else _FWD).choose(qkv, (window_block(side), qkv.shape[3]), fallback).warps


def _constants(qkv: Tensor, side: int, mask_value: float, backward: bool) -> dict[str, Any]:
    return {
        "HEAD_DIM": qkv.shape[3],
        "BLOCK_D": head_block(qkv.shape[3]),
        "SIDE": side,
        "BLOCK": window_block(side),
        "MASK_VALUE": mask_value * LOG2_E,
        "PRECISION": precision(qkv),
        "num_warps": _warps(qkv, side, backward),
        "num_stages": 1,
    }


def window_bias_tiles(bias: Tensor, side: int) -> Tensor:
    """`[heads, n, n]`, any strides -> fp32 `[heads, block, block]` as the kernels add it."""
    block = window_block(side)
    tiles = bias.new_empty(len(bias), block, block, dtype=torch.float32)
    _window_bias_tiles_kernel[(len(bias),)](
        bias, tiles, *bias.stride(), SIDE=side, BLOCK=block, LOG2=LOG2_E, num_warps=4
    )
    return tiles


def window_attention_fwd(
    qkv: Tensor,
    tiles: Tensor,
    pad: Tensor,
    maps: Sequence[int],
    side: int,
    shift: int,
    mask_value: float,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """`[tokens, 3, heads, d]` -> out `[tokens, heads * d]`, fp32 log2-sum-exp2 `[tokens, heads]` if kept.

    `tiles` are of as many heads or more, `pad` `[3, heads or more, d]` contiguous, `maps` flat triples.
    """
    heads, dim = qkv.shape[2:]
    out, lse = outputs_of(qkv, None, keep)
    for span in _spans(maps, side, heads):
        _window_attention_fwd_kernel[(span.windows * heads,)](
            qkv, tiles, pad, out, lse if keep else None,
            span.first, *span.sizes, shift, heads,
            *qkv.stride()[:3], pad.stride(0),
            dim**-0.5 * LOG2_E,
            **_constants(qkv, side, mask_value, backward=False),
        )  # fmt: skip
    return out, lse


def window_attention_bwd(
    qkv: Tensor,
    tiles: Tensor,
    pad: Tensor,
    lse: Tensor,
    dout: Tensor,
    maps: Sequence[int],
    side: int,
    shift: int,
    mask_value: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv `[tokens, 3, heads, d]`, of the bias (fp32) and of pad, both with all their heads."""
    heads, dim = qkv.shape[2:]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    spans = _spans(maps, side, heads)
    partials = sum(span.slices for span in spans)
    dbias = torch.empty(partials, heads, side**2, side**2, dtype=torch.float32, device=qkv.device)
    dpad = torch.empty(partials, heads, 2, head_block(dim), dtype=torch.float32, device=qkv.device)
    first_partial = 0
    for span in spans:
        _window_attention_bwd_kernel[(heads, span.slices)](
            qkv, tiles, pad, dout, lse, dqkv, dbias, dpad,
            span.first, *span.sizes, shift, heads, span.windows, first_partial,
            *qkv.stride()[:3], pad.stride(0),
            dim**-0.5, dim**-0.5 * LOG2_E,
            **_constants(qkv, side, mask_value, backward=True),
        )  # fmt: skip
        first_partial += span.slices
    dbias, whole_pad = dbias.sum(0), torch.zeros_like(pad)
    if heads < len(tiles):
        dbias = F.pad(dbias, (0, 0, 0, 0, 0, len(tiles) - heads))
    whole_pad[1:, :heads] = dpad[..., :dim].sum(0).transpose(0, 1)
    return dqkv, dbias, whole_pad


register(
    "window_bias_tiles(Tensor bias, int side) -> Tensor",
    window_bias_tiles,
    lambda bias, side: bias.new_empty(len(bias), *[window_block(side)] * 2, dtype=torch.float32),
)
register(
    "window_attention_fwd(Tensor qkv, Tensor tiles, Tensor pad, int[] maps, int side, int shift,"
    " float mask_value, bool keep=True) -> (Tensor, Tensor)",
    window_attention_fwd,
    lambda qkv, tiles, pad, maps, side, shift, mask_value, keep=True: outputs_of(qkv, None, keep),
)
register(
    "window_attention_bwd(Tensor qkv, Tensor tiles, Tensor pad, Tensor lse, Tensor dout,"
    " int[] maps, int side, int shift, float mask_value) -> (Tensor, Tensor, Tensor)",
    window_attention_bwd,
    lambda qkv, tiles, pad, lse, dout, maps, side, *rest: (
        qkv.new_empty(qkv.shape),
        tiles.new_empty(len(tiles), side**2, side**2),
        torch.empty_like(pad),
    ),  # fmt: skip
)


class WindowAttentionFunction(torch.autograd.Function):
    """Windowed attention with its gradients; outside of the registered operators, which saves host time."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor,
        pad: Tensor,
        maps: list[int],
        side: int,
        shift: int,
        mask_value: float,
        trains: bool,
    ) -> Tensor:
        qkv, tiles, pad = unit_stride(qkv), ops.window_bias_tiles(bias, side), pad.contiguous()
        geometry = (maps, side, shift, mask_value)
        keep = trains and any(ctx.needs_input_grad)
        out, lse = ops.window_attention_fwd(qkv, tiles, pad, *geometry, keep)
        ctx.save_for_backward(qkv, tiles, pad, lse)
        ctx.geometry = geometry
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, tiles, pad, lse = ctx.saved_tensors
        gradients = ops.window_attention_bwd(qkv, tiles, pad, lse, dout.contiguous(), *ctx.geometry)
        return *gradients, None, None, None, None, None
