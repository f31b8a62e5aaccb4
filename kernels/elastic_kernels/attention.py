"""Self-attention over packed crops: many short sequences of a few known lengths in one token tensor.

    o = softmax(q k^T / sqrt(d)) v          within each sequence, for each head

The sequences of one length lie together, so a launch serves a whole length class and no `cu_seqlens` are
needed. `qkv` holds the active heads only; it may be a strided view. The Triton kernels are in
`triton_ops/attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch

HEAD_DIMS = (16, 32, 64, 128)  # of the Triton kernels
MAX_LENGTH = 1024  # of the Triton kernels


def packed_attention(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Attend within every sequence of a packed token tensor.

    Args:
        qkv: `[tokens, 3, heads, head_dim]`, floating point, any strides.
        groups: `(count, length)` of each length class in packing order; their products sum to `tokens`.

    Returns:
        `[tokens, heads * head_dim]`, the dtype of `qkv`.

    Raises:
        ValueError: `qkv` is not 4-dimensional with three projections, or `groups` do not cover the tokens.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: the softmax and all sums are fp32 (but for half precision on CPUs). Results repeat bitwise.

    Example:
        >>> packed_attention(torch.randn(2 * 5 + 3 * 2, 3, 4, 16), [(2, 5), (3, 2)]).shape
        torch.Size([16, 64])
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"packed_attention: expected qkv [tokens, 3, heads, head_dim], got {tuple(qkv.shape)}"
        )
    covered = sum(count * length for count, length in groups)
    if covered != qkv.shape[0]:
        raise ValueError(
            f"packed_attention: groups {list(groups)} cover {covered} tokens, qkv has {qkv.shape[0]}"
        )
    if attention_backend(qkv, groups).backend == "triton":
        from elastic_kernels.triton_ops.attention import PackedAttention

        return PackedAttention.apply(qkv, [number for group in groups for number in group])
    return _attention_reference(qkv, groups)


def attention_backend(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> dispatch.Choice:
    """The backend that `packed_attention` takes for such arguments, and why."""
    dim, longest = qkv.shape[-1], max([0, *(length for _, length in groups)])
    limit = None
    if dim not in HEAD_DIMS:
        limit = f"the kernel takes head_dim {', '.join(map(str, HEAD_DIMS))}, got {dim}"
    elif longest > MAX_LENGTH:
        limit = f"the kernel takes lengths up to {MAX_LENGTH}, got {longest}"
    return dispatch.choose("packed_attention", qkv, limit)


def _attention_reference(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """The plain definition."""
    parts = qkv.split([count * length for count, length in groups])
    outputs = [
        _attend(part.unflatten(0, (count, length)))
        for part, (count, length) in zip(parts, groups, strict=True)
        if count
    ]
    return torch.cat(outputs) if outputs else qkv[:, 0].flatten(1)


def _attend(qkv: Tensor) -> Tensor:
    """`[count, length, 3, heads, head_dim]` -> `[count * length, heads * head_dim]`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # The fused attention's backward for half precision on CPUs is 2 to 9 times slower than this
        # (Xeon with AMX, torch 2.13, 5 to 197 tokens); in float32 the two are equal.
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)
