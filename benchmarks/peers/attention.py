"""Other implementations of attention over packed sequences of a few lengths, `[tokens, 3, heads, d]` in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.failures import Unavailable, require_cuda
from benchmarks.harness import Provider
from benchmarks.peers import naive
from elastic_kernels import backend, packed_attention

Groups = Sequence[tuple[int, int]]


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def sdpa(groups: Groups, kind: SDPBackend, device: torch.device) -> Provider:
    """PyTorch's attention by one of its backends, a call for each length."""
    require_cuda(device)

    def attend(qkv: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return naive.attention(qkv, groups)

    return attend


def varlen(groups: Groups, device: torch.device) -> Provider:
    """`torch.nn.attention.varlen`: all lengths in one launch."""
    require_cuda(device)
    _needs("torch.nn.attention.varlen")
    from torch.nn.attention.varlen import varlen_attn

    starts = _starts(groups, device)
    longest = max(length for _, length in groups)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (t.contiguous() for t in qkv.unbind(1))
        out = varlen_attn(q, k, v, starts, starts, longest, longest)
        assert isinstance(out, Tensor)
        return out.flatten(1)

    return attend


def flex(groups: Groups, device: torch.device) -> Provider:
    """FlexAttention with a block mask of the sequences, compiled."""
    require_cuda(device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    starts = _starts(groups, device)
    tokens = int(starts[-1])
    owner = torch.bucketize(torch.arange(tokens, device=device), starts[1:], right=True)

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return owner[query] == owner[key]

    mask = create_block_mask(same, None, None, tokens, tokens, device=str(device), _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv.unbind(1))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1).flatten(1)

    return attend


def xformers(groups: Groups, device: torch.device) -> Provider:
    """`BlockDiagonalMask`, as the official code; the same adapter as the kernels' own backend."""
    require_cuda(device)
    _needs("xformers")

    def attend(qkv: Tensor) -> Tensor:
        with backend("xformers"):
            return packed_attention(qkv, groups)

    return attend


def flash4(groups: Groups, device: torch.device) -> Provider:
    """FlashAttention-4 (CuTe), varlen."""
    require_cuda(device)
    _needs("flash_attn")
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable(f"flash_attn has no cute kernels: {error}") from None
    starts = _starts(groups, device)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)
        return (out[0] if isinstance(out, tuple) else out).flatten(1)

    return attend


def _starts(groups: Groups, device: torch.device) -> Tensor:
    lengths = torch.tensor([length for count, length in groups for _ in range(count)])
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)


def peers(groups: Groups, device: torch.device) -> dict[str, Callable[[], Provider]]:
    """All of them, by name."""
    kinds = {
        "sdpa-flash": SDPBackend.FLASH_ATTENTION,
        "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    providers: dict[str, Callable[[], Provider]] = {
        name: partial(sdpa, groups, kind, device) for name, kind in kinds.items()
    }
    others = (varlen, flex, xformers, flash4)
    return providers | {make.__name__: partial(make, groups, device) for make in others}
