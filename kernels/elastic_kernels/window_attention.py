"""Windowed self-attention over packed maps (Swin): attention within windows that tile a map, perhaps shifted.

    o = softmax(q k^T / sqrt(d) + bias[h] + region) v          within each window, for each head

A map is padded at the bottom and right to whole windows; padded positions have given q, k and v, and take
part as keys. With a shift the map is rolled first; where query and key of a window come from regions that do
not touch in the map, `region` is -100.

The Triton kernels are in `triton_ops/window_attention.py`.

Source: Swin Transformer (Liu et al., 2021); official `DynamicShiftWindowMSA`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch
from elastic_kernels.attention import WIDEST_HEAD
from elastic_kernels.dispatch import cached_constant, without_autocast

MAX_WINDOW = 8  # of the Triton kernels
MASK_VALUE = -100.0  # added to the score of a query and a key of different regions


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    pad: Tensor | None,
    maps: Sequence[tuple[int, int, int]],
    *,
    window: int,
    shift: int = 0,
) -> Tensor:
    """Attend within the windows of every map of a packed token tensor.

    Args:
        qkv: `[tokens, 3, heads, head_dim]`, the positions of each map row by row; any strides.
        bias: `[heads_max, n, n]`, n = window**2, added to the scores of query (row) and key (column); only
            the first `heads` are read.
        pad: `[3, heads_max, head_dim]`, q, k and v of padded positions; only the first `heads` are read.
            None: zeros.
        maps: `(count, height, width)` of each group in packing order.
        window: side of a window.
        shift: of the windows towards the bottom right, 0 <= shift < window.

    Returns:
        `[tokens, heads * head_dim]`, the dtype of `qkv`.

    Raises:
        ValueError: shapes that do not fit together, or a shift outside the window.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: in the Triton kernels the softmax and all sums are fp32, and results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import window_attention
        >>> qkv, bias = torch.randn(2 * 5 * 5, 3, 4, 16), torch.zeros(4, 9, 9)
        >>> window_attention(qkv, bias, None, [(2, 5, 5)], window=3, shift=1).shape
        torch.Size([50, 64])
    """
    _validate(qkv, bias, pad, maps, window, shift)
    heads, head_dim = qkv.shape[2:]
    pad = qkv.new_zeros(3, heads, head_dim) if pad is None else pad.to(qkv.dtype)
    if window_attention_backend(qkv, window, head_dim).backend == "triton":
        from elastic_kernels.triton_ops.window_attention import WindowAttentionFunction

        sizes = [number for group in maps for number in group]
        geometry = (sizes, window, shift, MASK_VALUE)
        return WindowAttentionFunction.apply(qkv, bias, pad, *geometry, torch.is_grad_enabled())
    bias, pad = bias[:heads], pad[:, :heads]
    parts = qkv.split([count * height * width for count, height, width in maps])
    outputs = [
        _attend(part.unflatten(0, sizes), bias, pad, window, shift)
        for part, sizes in zip(parts, maps, strict=True)
    ]
    return torch.cat(outputs)


def window_attention_backend(
    x: Tensor, window: int, head_dim: int, dtype: torch.dtype | None = None
) -> dispatch.Choice:
    """The backend that `window_attention` takes for q, k and v on the device of `x`, and why.

    `dtype` is theirs, if not that of `x`.
    """
    limit = None
    if head_dim > WIDEST_HEAD:
        limit = f"the kernel takes head_dim up to {WIDEST_HEAD}, got {head_dim}"
    elif window > MAX_WINDOW:
        limit = f"the kernel takes windows up to {MAX_WINDOW}, got {window}"
    return dispatch.choose("window_attention", x, limit, dtype)


def _attend(qkv: Tensor, bias: Tensor, pad: Tensor, window: int, shift: int) -> Tensor:
    """The plain definition for maps `[count, height, width, 3, heads, head_dim]` of one size."""
    count, height, width, _, heads, head_dim = qkv.shape
    rows, columns = -(-height // window) * window, -(-width // window) * window
    if (rows, columns) != (height, width):
        margin = (0, columns - width, 0, rows - height)
        inside = F.pad(qkv.new_ones(height, width, dtype=torch.bool), margin)[..., None, None, None]
        qkv = torch.where(inside, F.pad(qkv, (*[0] * 6, *margin)), pad)
    x = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # [count, i, r, j, c, 3, heads, head_dim]
    q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)  # [count, i, j, heads, n, head_dim]
    scores = (q * head_dim**-0.5) @ k.transpose(-1, -2) + bias.to(qkv.dtype)
    if shift:
        differ = cached_constant(qkv, _regions_differ, rows, columns, window, shift, qkv.device)
        scores = scores + differ.unsqueeze(2).to(scores.dtype) * MASK_VALUE
    x = scores.softmax(-1) @ v
    x = x.unflatten(4, (window, window)).permute(0, 1, 4, 2, 5, 3, 6)  # [count, i, r, j, c, heads, head_dim]
    x = x.flatten(3, 4).flatten(1, 2)
    x = x.roll((shift, shift), (1, 2)) if shift else x
    return x[:, :height, :width].reshape(count * height * width, heads * head_dim)


@lru_cache(maxsize=64)
def _regions_differ(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """bool `[rows / window, columns / window, n, n]`: query and key lie in different regions."""

    def regions(side: int) -> Tensor:
        place = torch.arange(side)
        return ((place >= side - window).long() + (place >= side - shift).long()).view(-1, window)

    label = 3 * regions(rows)[:, None, :, None] + regions(columns)[None, :, None, :]
    label = label.flatten(2)
    return (label.unsqueeze(-1) != label.unsqueeze(-2)).to(device)


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """Look up the bias of window attention in a table of offsets.

    Args:
        table: `[(2 * window - 1)**2, heads]`; entry `(dy + window - 1) * (2 * window - 1) + dx + window - 1`
            belongs to a query that lies `(dy, dx)` below and right of its key.
        window: side of a window.

    Returns:
        `[heads, n, n]`, n = window**2, the dtype of `table`.

    Numerics: a product with a matrix of zeros and ones, whose gradient has the same bits every time.

    Example:
        >>> import torch
        >>> from elastic_kernels import relative_position_bias
        >>> relative_position_bias(torch.randn(169, 4), 7).shape
        torch.Size([4, 49, 49])
    """
    n = window**2
    with without_autocast(table.device):
        chosen = cached_constant(table, _chosen, window, table.device).to(table.dtype) @ table
    return chosen.t().unflatten(1, (n, n))


@lru_cache(maxsize=16)
def _chosen(window: int, device: torch.device) -> Tensor:
    """float32 `[n * n, (2 * window - 1)**2]`, a one in each row."""
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    side = 2 * window - 1
    index = (y[:, None] - y + window - 1) * side + x[:, None] - x + window - 1
    return F.one_hot(index.flatten(), side**2).float().to(device)


def _validate(
    qkv: Tensor,
    bias: Tensor,
    pad: Tensor | None,
    maps: Sequence[tuple[int, int, int]],
    window: int,
    shift: int,
) -> None:
    op = "window_attention"
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{op}: expected qkv [tokens, 3, heads, head_dim], got {tuple(qkv.shape)}")
    heads, head_dim = qkv.shape[2:]
    validate_windows(op, heads, bias, window, shift)
    if pad is not None and (pad.dim() != 3 or pad.shape[1] < heads or pad.shape[::2] != (3, head_dim)):
        raise ValueError(f"{op}: expected pad [3, {heads} or more, {head_dim}], got {tuple(pad.shape)}")
    covered = sum(count * height * width for count, height, width in maps)
    if covered != qkv.shape[0]:
        raise ValueError(f"{op}: maps {list(maps)} cover {covered} tokens, qkv has {qkv.shape[0]}")


def validate_windows(op: str, heads: int, bias: Tensor, window: int, shift: int) -> None:
    """Raise ValueError for a bias that does not fit the heads and windows, or a shift outside of them."""
    n = window**2
    if bias.dim() != 3 or bias.shape[0] < heads or bias.shape[1:] != (n, n):
        raise ValueError(f"{op}: expected bias [{heads} or more, {n}, {n}], got {tuple(bias.shape)}")
    if not 0 <= shift < window:
        raise ValueError(f"{op}: expected a shift in 0..{window - 1}, got {shift}")
