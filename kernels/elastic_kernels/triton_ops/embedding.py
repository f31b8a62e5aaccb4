"""Triton kernels between the product with patches and the packed tokens of a vision transformer.

    out[crop, p] = (first[p], or y[crop, p - prefix], or the mask token where that is masked) + positions[p]

Backward: a program owns a position and goes over the crops, so that sums over crops need no atomics. The
gradient of the first tokens is that of their positions. Saved for backward: the masks. Bytes: forward reads y
and writes out; backward reads its gradient and writes that of y.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv, unit_stride
from elastic_kernels.triton_ops.gemm import product_into
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.layer_norm import row_config
from elastic_kernels.triton_ops.registration import first_order, ops, register

CROPS, CHANNELS = 16, 128  # of the tile of a backward's program


@launched("tokens", "length", "prefix")
def _embedding_fwd_kernel(
    y_ptr, mask_ptr, first_ptr, mask_token_ptr, before_ptr, positions_ptr, out_ptr,
    tokens, length, prefix, width,
    stride_f, stride_b, stride_p,
    HAS_MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`before` are the positions of the first tokens, `positions` those of patches."""
    token, offs_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask_t, mask_k = token < tokens, offs_k < width
    place = token % length
    early, late = mask_t & (place < prefix), mask_t & (place >= prefix)
    patch = (token // length * (length - prefix) + place - prefix).to(tl.int64)
    dtype = y_ptr.dtype.element_ty
    is_patch, is_first = late[:, None] & mask_k[None, :], early[:, None] & mask_k[None, :]
    x = tl.load(y_ptr + patch[:, None] * width + offs_k[None, :], mask=is_patch, other=0.0).to(tl.float32)
    if HAS_MASK:
        hidden = tl.load(mask_ptr + patch, mask=late, other=0) != 0
        mask_token = tl.load(mask_token_ptr + offs_k, mask=mask_k, other=0.0).to(dtype).to(tl.float32)
        x = tl.where(hidden[:, None], mask_token[None, :], x)
    first = tl.load(first_ptr + place[:, None] * stride_f + offs_k[None, :], mask=is_first, other=0.0)
    before = tl.load(before_ptr + place[:, None] * stride_b + offs_k[None, :], mask=is_first, other=0.0)
    at = (place - prefix)[:, None] * stride_p + offs_k[None, :]
    positions = tl.load(positions_ptr + at, mask=is_patch, other=0.0).to(tl.float32)
    x += first.to(dtype).to(tl.float32) + before.to(tl.float32) + positions
    out = out_ptr + token.to(tl.int64)[:, None] * width + offs_k[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_k[None, :])


@launched("crops", "length", "prefix")
def _embedding_bwd_kernel(
    dout_ptr, mask_ptr, dy_ptr, sums_ptr, masked_ptr,
    crops, length, prefix, width,
    stride_o,
    HAS_MASK: tl.constexpr, CROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy, and sums over crops of a position's gradients: of all, and of those that are masked."""
    place, offs_k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_k = offs_k < width
    sums, masked = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, crops, CROPS):
        crop = (start + tl.arange(0, CROPS)).to(tl.int64)
        mask = (crop < crops)[:, None] & mask_k[None, :]
        at = (crop * length + place)[:, None] * stride_o + offs_k[None, :]
        d = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(d, 0)
        patch = crop * (length - prefix) + place - prefix
        if HAS_MASK:
            hidden = tl.load(mask_ptr + patch, mask=(crop < crops) & (place >= prefix), other=0) != 0
            masked += tl.sum(tl.where(hidden[:, None], d, 0.0), 0)
            d = tl.where(hidden[:, None], 0.0, d)
        dy = dy_ptr + patch[:, None] * width + offs_k[None, :]
        tl.store(dy, d.to(dy_ptr.dtype.element_ty), mask=mask & (place >= prefix))
    tl.store(sums_ptr + place * width + offs_k, sums, mask=mask_k)
    if HAS_MASK:
        tl.store(masked_ptr + place * width + offs_k, masked, mask=mask_k)


class _Group(NamedTuple):
    """Crops of one size: how many, their tokens and patches among all, their mask and resizing."""

    crops: int
    length: int
    tokens: slice
    patches: slice
    mask: Tensor | None
    resizing: Tensor | None


def _groups(
    crops: list[int], masks: list[Tensor | None], resizings: list[Tensor | None], prefix: int, trained: int
) -> Iterator[_Group]:
    token = patch = 0
    for count, mask, resizing in zip(crops, masks, resizings, strict=True):
        patches = trained if resizing is None else resizing.shape[0]
        length = prefix + patches
        tokens = slice(token, token + count * length)
        yield _Group(count, length, tokens, slice(patch, patch + count * patches), mask, resizing)
        token, patch = tokens.stop, patch + count * patches


def embedding_fwd(
    y: Tensor,
    first: Tensor,
    positions: Tensor,
    mask_token: Tensor | None,
    crops: list[int],
    masks: list[Tensor | None],
    resizings: list[Tensor | None],
) -> Tensor:
    """Tokens `[tokens, w]` of groups of so many crops each.

    Args:
        y: `[patches, w]` of all groups, contiguous.
        first: `[prefix, C]`, tokens before the patches.
        positions: `[prefix + trained, C]`.
        mask_token: `[C]` or None.
        crops, masks, resizings: of each group, as of `elastic_embedding`.
    """
    prefix, width = first.shape[0], y.shape[1]
    groups = list(_groups(crops, masks, resizings, prefix, len(positions) - prefix))
    config, dtype = row_config(width), torch.promote_types(y.dtype, positions.dtype)
    out = torch.empty(groups[-1].tokens.stop, width, dtype=dtype, device=y.device)
    for group in groups:
        part, after = out[group.tokens], positions[prefix:]
        if group.resizing is not None:
            after = torch.mm(group.resizing.to(positions.dtype), after[:, :width])
        if not len(part):
            continue
        _embedding_fwd_kernel[(cdiv(len(part), config.rows),)](
            y[group.patches], group.mask, first, mask_token, positions, after, part,
            len(part), group.length, prefix, width,
            first.stride(0), positions.stride(0), after.stride(0),
            HAS_MASK=group.mask is not None, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return out


def embedding_bwd(
    dout: Tensor,
    positions: Tensor,
    mask_token: Tensor | None,
    crops: list[int],
    masks: list[Tensor | None],
    resizings: list[Tensor | None],
    prefix: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y in a dtype, of the first tokens, of positions and of the mask token, full-shape."""
    width = dout.shape[1]
    groups = list(_groups(crops, masks, resizings, prefix, len(positions) - prefix))
    dy = torch.empty(groups[-1].patches.stop, width, dtype=dtype, device=dout.device)
    dpositions = torch.zeros(positions.shape, dtype=torch.float32, device=dout.device)
    dmask = torch.zeros(0 if mask_token is None else len(mask_token), dtype=torch.float32, device=dout.device)
    active = dpositions[:, :width]
    for group in groups:
        sums = torch.empty(2, group.length, width, dtype=torch.float32, device=dout.device)
        _embedding_bwd_kernel[(group.length, cdiv(width, CHANNELS))](
            dout[group.tokens], group.mask, dy[group.patches], sums[0], sums[1],
            group.crops, group.length, prefix, width,
            dout.stride(0),
            HAS_MASK=group.mask is not None, CROPS=CROPS, BLOCK=CHANNELS, num_warps=4,
        )  # fmt: skip
        if group.resizing is None:
            active.add_(sums[0])  # in-place indexing would also copy itself
        else:
            active[:prefix].add_(sums[0, :prefix])
            product_into(active[prefix:], group.resizing.float().t(), sums[0, prefix:], add=True)
        if group.mask is not None:
            dmask[:width].add_(sums[1, prefix:].sum(0))
    return dy, dpositions[:prefix].to(positions.dtype, copy=True), dpositions.to(positions.dtype), dmask


def _last(
    crops: list[int], masks: list[Tensor | None], resizings: list[Tensor | None], prefix: int, trained: int
) -> _Group:
    *_, last = _groups(crops, masks, resizings, prefix, trained)
    return last


register(
    "embedding_fwd(Tensor y, Tensor first, Tensor positions, Tensor? mask_token, int[] crops,"
    " Tensor?[] masks, Tensor?[] resizings) -> Tensor",
    embedding_fwd,
    lambda y, first, positions, mask_token, crops, masks, resizings: y.new_empty(
        _last(crops, masks, resizings, len(first), len(positions) - len(first)).tokens.stop,
        y.shape[1],
        dtype=torch.promote_types(y.dtype, positions.dtype),
    ),
)
register(
    "embedding_bwd(Tensor dout, Tensor positions, Tensor? mask_token, int[] crops, Tensor?[] masks,"
    " Tensor?[] resizings, int prefix, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    embedding_bwd,
    lambda dout, positions, mask_token, crops, masks, resizings, prefix, dtype: (
        dout.new_empty(
            _last(crops, masks, resizings, prefix, len(positions) - prefix).patches.stop,
            dout.shape[1],
            dtype=dtype,
        ),
        positions.new_empty(prefix, positions.shape[1]),
        torch.empty_like(positions),
        dout.new_empty(0 if mask_token is None else len(mask_token), dtype=torch.float32),
    ),
)


class EmbeddingFunction(torch.autograd.Function):
    """Tokens of all groups, of products with their patches."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        cls_token: Tensor,
        registers: Tensor | None,
        positions: Tensor,
        mask_token: Tensor | None,
        prefix: int,
        crops: list[int],
        masks: list[Tensor | None],
        resizings: list[Tensor | None],
    ) -> Tensor:
        first = cls_token.contiguous() if registers is None else torch.cat([cls_token, registers], 1)
        positions = positions.contiguous()
        mask_token = None if mask_token is None else mask_token.contiguous()
        masks = [None if mask is None else mask.contiguous().view(torch.uint8) for mask in masks]
        token = None if mask_token is None else mask_token[0]
        ctx.save_for_backward(positions, mask_token)
        ctx.rest = crops, masks, resizings, prefix, y.dtype
        return ops.embedding_fwd(y, first[0], positions[0], token, crops, masks, resizings)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        positions, mask_token = ctx.saved_tensors
        token = None if mask_token is None else mask_token[0]
        dy, dfirst, dpositions, dmask = ops.embedding_bwd(unit_stride(dout), positions[0], token, *ctx.rest)
        dmask_token = None if mask_token is None else dmask[None].to(mask_token.dtype)
        dcls, dregisters = dfirst[None].split([1, len(dfirst) - 1], 1)
        registers = dregisters if dregisters.numel() else None
        return dy, dcls, registers, dpositions[None], dmask_token, None, None, None, None
