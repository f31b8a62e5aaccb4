"""Self-attention over packed crops: many short sequences of a few known lengths in one token tensor.

    o = softmax(q k^T / sqrt(d)) v          within each sequence, for each head

Where the sequences of one length lie together, a launch serves a whole length class and needs no
`cu_seqlens`; sequences of any lengths are given by their offsets, and take one launch. `qkv` holds the active
heads only; it may be a strided view. The Triton kernels are in `triton_ops/attention.py`; `backend("sdpa")`
and `backend("xformers")` select others behind the same function.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate

WIDEST_HEAD = 128  # channels, of the Triton kernels
MAX_LENGTH = 4096  # of the Triton kernels


Groups = Sequence[tuple[int, int]] | Tensor


def packed_attention(qkv: Tensor, groups: Groups, heads: Tensor | None = None) -> Tensor:
    """Attend within every sequence of a packed token tensor.

    Args:
        qkv: `[tokens, 3, heads, head_dim]`, floating point, any strides.
        groups: `(count, length)` of each length class in packing order, whose products sum to `tokens`; or
            the offsets of sequences of any lengths, integers `[sequences + 1]` from 0 to `tokens` on the
            device of `qkv`, which nothing waits for.
        heads: int64 `[tokens]`, how many heads each row has, the same in a sequence; default all. Others are
            absent: nothing of them is read, and they are 0 in the result.

    Returns:
        `[tokens, heads * head_dim]`, the dtype of `qkv`.

    Raises:
        ValueError: `qkv` is not 4-dimensional with three projections, or `groups` do not cover the tokens.
        RuntimeError: a backend was forced (see `backend`) and cannot run here.

    With offsets, the plain definition computes the scores between all tokens on a GPU and in graphs of
    `torch.compile` and `torch.export`, and masks them; `tokens` may be symbolic there.

    Numerics: in the Triton kernels the softmax and all sums are fp32, and results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import packed_attention
        >>> packed_attention(torch.randn(2 * 5 + 3 * 2, 3, 4, 16), [(2, 5), (3, 2)]).shape
        torch.Size([16, 64])
        >>> packed_attention(torch.randn(9, 3, 4, 16), torch.tensor([0, 2, 3, 9])).shape
        torch.Size([9, 64])
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"packed_attention: expected qkv [tokens, 3, heads, head_dim], got {tuple(qkv.shape)}"
        )
    if heads is not None and heads.dtype != torch.int64:
        raise ValueError(f"packed_attention: expected heads int64 [{qkv.shape[0]}], got {heads.dtype}")
    validate.vectors("packed_attention", qkv, heads=(heads, qkv.shape[0]))
    covered = qkv.shape[0] if isinstance(groups, Tensor) else sum(class_sizes(groups))
    if covered != qkv.shape[0]:
        raise ValueError(
            f"packed_attention: groups {list(groups)} cover {covered} tokens, qkv has {qkv.shape[0]}"
        )
    if heads is not None and attention_backend(qkv, groups, qkv.shape[-1]).backend != "triton":
        present = torch.arange(qkv.shape[2], device=qkv.device) < heads.unsqueeze(1)
        qkv, heads = qkv.where(present[:, None, :, None], 0), None
    if isinstance(groups, Tensor):
        return _by_offsets(qkv, groups, heads)
    choice = attention_backend(qkv, groups, qkv.shape[-1]).backend
    if choice == "triton":
        from elastic_kernels.triton_ops.attention import AttentionFunction

        pairs = [number for group in groups for number in group]
        return AttentionFunction.apply(qkv, pairs, heads, torch.is_grad_enabled())
    if choice == "xformers":
        return _attention_xformers(qkv, groups)
    attend = F.scaled_dot_product_attention if choice == "sdpa" else _attend_reference
    return _by_length(qkv, groups, attend)


def class_sizes(groups: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of each length class. Raises ValueError unless these are pairs, of no negative number."""
    pairs = isinstance(groups, (tuple, list)) and all(isinstance(g, (tuple, list)) for g in groups)
    if not pairs or any(len(group) != 2 or any(n < 0 for n in group) for group in groups):
        raise ValueError(f"groups: expected [(count, length), ...] or a tensor of offsets, got {groups}")
    return [count * length for count, length in groups]


def attention_backend(
    x: Tensor, groups: Groups, head_dim: int, dtype: torch.dtype | None = None
) -> dispatch.Choice:
    """The backend that `packed_attention` takes for `qkv` of such sizes, on the device of `x`, and why.

    `dtype` is that of `qkv`; default that of `x`.
    """
    dtype = dtype or x.dtype
    if dispatch.forced() == "sdpa":
        return dispatch.Choice("sdpa", "forced")
    if dispatch.forced() == "xformers":
        obstacle = _xformers_obstacle(x.device, dtype)
        if obstacle:
            raise RuntimeError(f"packed_attention: expected xformers, which was forced, but {obstacle}")
        return dispatch.Choice("xformers", "forced")
    longest = 0 if isinstance(groups, Tensor) else max([0, *(length for _, length in groups)])
    limit = None
    if head_dim > WIDEST_HEAD:
        limit = f"the kernel takes head_dim up to {WIDEST_HEAD}, got {head_dim}"
    elif longest > MAX_LENGTH:
        limit = f"the kernel takes lengths up to {MAX_LENGTH}, got {longest}"
    choice = dispatch.choose("packed_attention", x, limit, dtype)
    if x.is_cuda and choice.backend == "reference" and dispatch.forced() is None:
        return dispatch.Choice("sdpa", choice.reason)
    return choice


def _by_offsets(qkv: Tensor, offsets: Tensor, heads: Tensor | None) -> Tensor:
    """Attention within the sequences that begin at offsets."""
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or offsets.device != qkv.device:
        raise ValueError(
            f"packed_attention: expected offsets int32 or int64 [sequences + 1] on {qkv.device}, got "
            f"{offsets.dtype} {list(offsets.shape)} on {offsets.device}"
        )
    if attention_backend(qkv, offsets, qkv.shape[-1]).backend == "triton":
        from elastic_kernels.triton_ops.attention_blocks import AttentionOffsetsFunction

        return AttentionOffsetsFunction.apply(qkv, offsets, heads, torch.is_grad_enabled())
    if offsets.is_cpu and type(offsets) is Tensor and not torch.compiler.is_compiling():
        ends = offsets.tolist()
        lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        if not ends or ends[0] != 0 or ends[-1] != qkv.shape[0] or min([0, *lengths]) < 0:
            raise ValueError(
                f"packed_attention: expected offsets rising from 0 to {qkv.shape[0]}, got {ends}"
            )
        return packed_attention(qkv, [(len(list(same)), length) for length, same in groupby(lengths)])
    sequence = torch.bucketize(torch.arange(qkv.shape[0], device=qkv.device), offsets[1:], right=True)
    q, k, v = qkv.permute(1, 2, 0, 3).unbind(0)
    mask = sequence.unsqueeze(0) == sequence.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1)


def _by_length(
    qkv: Tensor, groups: Sequence[tuple[int, int]], attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Each length class as a batch `[count, heads, length, head_dim]`."""
    outputs = []
    for part, (count, length) in zip(qkv.split([c * n for c, n in groups]), groups, strict=True):
        if count:
            q, k, v = part.unflatten(0, (count, length)).permute(2, 0, 3, 1, 4).unbind(0)
            outputs.append(attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(outputs) if outputs else qkv[:, 0].flatten(1)


def _attend_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain definition.

    On a CPU it is as fast in float32 as the fused attention of PyTorch, whose backward in half precision is 2
    to 9 times slower (Xeon with AMX, torch 2.13, 5 to 197 tokens).
    """
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def _xformers_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}, expected cuda"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {dtype}"
    return None


def _attention_xformers(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    lengths = tuple(length for count, length in groups for _ in range(count))
    if not lengths:
        return qkv[:, 0].flatten(1)
    q, k, v = qkv.unsqueeze(0).unbind(2)
    return memory_efficient_attention(q, k, v, _block_diagonal(lengths, qkv.device))[0].flatten(1)


@lru_cache(maxsize=64)
def _block_diagonal(lengths: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(lengths, device=device)
