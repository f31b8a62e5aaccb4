"""Modules on batches whose rows have widths of their own: attention, MLPs and pre-norm blocks.

Parameters are those of the largest network, in the modules that serve one width a call. Rows of a sequence
are equally wide, and have as many heads. Operators: `mixed_width.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels.attention import Groups, packed_attention
from elastic_kernels.blocks import ElasticBlock
from elastic_kernels.mixed_width import (
    beyond,
    check_widths,
    mixed_width_layer_norm,
    mixed_width_linear,
    mixed_width_rms_norm,
    mixed_width_stacked,
)
from elastic_kernels.mlp import gated
from elastic_kernels.modules import ElasticAttention, ElasticLayerNorm, ElasticMLP
from elastic_kernels.qk_norm import qk_norm
from elastic_kernels.rotary import Rotary
from elastic_kernels.vit_layers import (
    ElasticPreNormBlock,
    ElasticRMSNorm,
    ElasticRotaryAttention,
    ElasticSwiGLU,
    scaled,
)


def mixed_width_attention(
    attn: ElasticAttention,
    x: Tensor,
    groups: Groups,
    widths: Tensor,
    heads: Tensor | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """Attend within every sequence, with the heads that go with its width.

    Args:
        attn: of the largest network, perhaps an `ElasticRotaryAttention`.
        x: `[tokens, w_max]`; those of one sequence are equally wide.
        groups: as of `packed_attention`.
        widths: int64 `[tokens]`, as in `mixed_width_linear`.
        heads: int64 `[tokens]`; default the share that the width of a row has, a whole number.
        rotary: angles of all tokens.

    Returns:
        `[tokens, w_max]`; beyond its width a row is 0.

    Of heads that a sequence lacks the Triton kernels read nothing, and write zeros.

    Raises:
        ValueError, TypeError, RuntimeError: as the operators it is made of.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticAttention, mixed_width_attention
        >>> widths = torch.tensor([16] * 5 + [32] * 5)  # two sequences of 5 tokens
        >>> mixed_width_attention(ElasticAttention(32, 16), torch.randn(10, 32), [(2, 5)], widths).shape
        torch.Size([10, 32])
    """
    op, qkv, inner = "mixed_width_attention", attn.qkv, attn.proj.in_features
    if heads is None:
        heads = widths * inner // (attn.proj.out_features * attn.head_dim)
    channels = heads * attn.head_dim
    h = mixed_width_stacked(op, x, qkv.weight, qkv.bias, widths, channels, 3, scale=attn.scale)
    h = h.unflatten(-1, (-1, attn.head_dim))
    if isinstance(attn, ElasticRotaryAttention):
        h = attn.before_attention(h, rotary)
    elif rotary is not None:
        h = qk_norm(h, rotary=rotary)
    h = packed_attention(h, groups, heads)
    return mixed_width_linear(h, attn.proj.weight, attn.proj.bias, channels, widths, scale=attn.scale)


def mixed_width_mlp(
    mlp: ElasticMLP | ElasticSwiGLU, x: Tensor, widths: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """Apply an MLP to every row at its own width and hidden units.

    Args:
        mlp: of the largest network.
        x: `[rows, w_max]`.
        widths: int64 `[rows]`, as in `mixed_width_linear`.
        hidden: int64 `[rows]`; default the share that the width of a row has, as `elastic_hidden_features`.

    Returns, Raises: as `mixed_width_attention`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticMLP, mixed_width_mlp
        >>> mixed_width_mlp(ElasticMLP(32, 64), torch.randn(2, 32), torch.tensor([16, 32])).shape
        torch.Size([2, 32])
    """
    op, fc1, fc2 = "mixed_width_mlp", mlp.fc1, mlp.fc2
    if hidden is None:
        hidden = (widths.double() / fc2.out_features * fc2.in_features).long()
    if isinstance(mlp, ElasticSwiGLU):
        h = mixed_width_stacked(op, x, fc1.weight, fc1.bias, widths, hidden, 2, scale=mlp.scale)
        h = gated(op, h, mlp.activation)
    else:
        h = mixed_width_linear(
            x, fc1.weight, fc1.bias, widths, hidden, scale=mlp.scale, activation=mlp.activation
        )
    return mixed_width_linear(h, fc2.weight, fc2.bias, hidden, widths, scale=mlp.scale)


def mixed_width_block(
    block: ElasticBlock | ElasticPreNormBlock,
    x: Tensor,
    groups: Groups,
    widths: Tensor,
    *,
    hidden: Tensor | None = None,
    heads: Tensor | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """Pass every row through a block at its own width, with the heads and hidden units that go with it.

    Args:
        block: of the largest network.
        x, groups, widths, heads, rotary: as of `mixed_width_attention`.
        hidden: as of `mixed_width_mlp`.

    Returns:
        `[tokens, w_max]`, the dtype of `x`; beyond its width a row is 0.

    Raises:
        ValueError, TypeError, RuntimeError: as the operators it is made of.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBlock, mixed_width_block
        >>> widths = torch.tensor([16] * 5 + [32] * 5)  # two sequences of 5 tokens
        >>> mixed_width_block(ElasticBlock(32, 64, 16), torch.randn(10, 32), [(2, 5)], widths).shape
        torch.Size([10, 32])
    """
    op = "mixed_width_block"
    if not isinstance(block, ElasticBlock | ElasticPreNormBlock):
        raise TypeError(f"{op}: expected an ElasticBlock or ElasticPreNormBlock, got {type(block).__name__}")
    check_widths(op, x, widths=widths)
    x = x.masked_fill(beyond(widths, x.shape[1]), 0)
    h = mixed_width_attention(block.attn, _norm(block.norm1, x, widths), groups, widths, heads, rotary)
    x = x + scaled(block.ls1, h, x)
    h = mixed_width_mlp(block.mlp, _norm(block.norm2, x, widths), widths, hidden)
    return x + scaled(block.ls2, h, x)


def _norm(norm: torch.nn.Module, x: Tensor, widths: Tensor) -> Tensor:
    if isinstance(norm, ElasticRMSNorm):
        return mixed_width_rms_norm(x, norm.weight, norm.eps, widths)
    assert isinstance(norm, ElasticLayerNorm)
    return mixed_width_layer_norm(x, norm.weight, norm.bias, norm.eps, widths)
