"""Elastic layers as `nn.Module`s: they hold the largest network's parameters and nothing about a subnet.

The width is that of the input. Parameter names are those of timm's vision transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kernels.attention import packed_attention
from elastic_kernels.block import KeptRows, elastic_attention_half, elastic_mlp_half
from elastic_kernels.layer_norm import elastic_layer_norm
from elastic_kernels.linear import elastic_linear, elastic_qkv
from elastic_kernels.mlp import elastic_mlp

Groups = Sequence[tuple[int, int]]


class ElasticLinear(nn.Linear):
    """`nn.Linear` that takes inputs of any width up to `in_features`; see `elastic_linear`."""

    def forward(self, x: Tensor, out_features: int | None = None) -> Tensor:
        """`[..., in]` -> `[..., out_features]`, by default all."""
        return elastic_linear(x, self.weight, self.bias, out_features=out_features)


class ElasticLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over inputs of any width up to its own; see `elastic_layer_norm`."""

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """`[..., w]` -> the same shape; with `rows` `[tokens, w]` -> `[kept, w]`."""
        return elastic_layer_norm(x, self.weight, self.bias, self.eps, rows=rows)


class ElasticAttention(nn.Module):
    """Self-attention with the first heads of shared projections.

    Args:
        width: of the largest network, a multiple of `head_dim`.
        head_dim: channels of a head.
        qkv_bias: whether the q, k and v projections have a bias.
    """

    def __init__(self, width: int, head_dim: int, qkv_bias: bool = True):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width: expected a multiple of head_dim {head_dim}, got {width}")
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = ElasticLinear(width, width)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """`[tokens, w]` -> `[tokens, w]` within each sequence; `groups` are `(count, length)` pairs."""
        qkv = elastic_qkv(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (-1, self.head_dim))
        return self.proj(packed_attention(qkv, groups), out_features=x.shape[-1])


class ElasticMLP(nn.Module):
    """Two linears around an exact GELU; see `elastic_mlp`.

    Args:
        width, hidden: of the largest network.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., w]` -> `[..., w]`."""
        fc1, fc2 = self.fc1, self.fc2
        return elastic_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class LayerScale(nn.Module):
    """A trained factor of each channel of a branch."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))


class ElasticBlock(nn.Module):
    """Pre-norm transformer block on packed tokens of any width up to its own.

    Args:
        width, hidden: of the largest network.
        head_dim: channels of a head.
        eps: of both norms.
        layer_scale: initial LayerScale; None means none.
        qkv_bias: whether the q, k and v projections have a bias.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        head_dim: int,
        *,
        eps: float = 1e-6,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.norm1 = ElasticLayerNorm(width, eps=eps)
        self.attn = ElasticAttention(width, head_dim, qkv_bias)
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = ElasticLayerNorm(width, eps=eps)
        self.mlp = ElasticMLP(width, hidden)
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        kept: tuple[KeptRows, KeptRows] | None = None,
        recompute_mlp: bool = False,
        only: Tensor | None = None,
        reuse: bool = False,
    ) -> Tensor:
        """One block.

        Args:
            x: `[tokens, w]`.
            groups: `(count, length)` of each length class in packing order.
            kept: the sequences that take part in the attention half and in the MLP half.
            recompute_mlp: save nothing as wide as the hidden layer for backward.
            only: int64 `[live]`, distinct tokens that are wanted (of a last block): the projection and the
                MLP are computed for these alone.
            reuse: the result may overwrite `x`, which nobody else needs.

        Returns:
            `[tokens, w]`, or with `only` `[live, w]`; the dtype of `x`.
        """
        first, second = kept or (None, None)
        tokens, row_scale = len(x), None
        norm, attn, mlp = self.norm1, self.attn, self.mlp
        x = elastic_attention_half(
            x, norm.weight, norm.bias, norm.eps,
            attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias,
            self.ls1.gamma if self.ls1 else None, groups, attn.head_dim, kept=first, only=only, reuse=reuse,
        )  # fmt: skip
        if second and only is not None:
            (_, row_scale), second = second.among(only, tokens), None
        norm = self.norm2
        return elastic_mlp_half(
            x, norm.weight, norm.bias, norm.eps,
            mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
            self.ls2.gamma if self.ls2 else None, kept=second, row_scale=row_scale, recompute=recompute_mlp,
            reuse=True,
        )  # fmt: skip


def elastic_block_from_vit(block: Any) -> ElasticBlock:
    """An elastic block that shares the parameters of a timm-style ViT block.

    Args:
        block: a module with `norm1`, `attn.qkv`, `attn.proj`, `attn.num_heads`, `norm2`, `mlp.fc1`,
            `mlp.fc2`, and perhaps `ls1.gamma` and `ls2.gamma`, such as
            `timm.models.vision_transformer.Block`.

    Returns:
        The block; its parameters are those of `block`, not copies. Stochastic depth and dropout are not taken
        over: pass `kept` to the block instead.

    Raises:
        ValueError: the block has parts that an elastic block lacks, such as norms of q and k.
    """
    attn, mlp = block.attn, block.mlp
    for owner, name in ((attn, "q_norm"), (attn, "k_norm"), (attn, "norm"), (mlp, "norm")):
        part = getattr(owner, name, None)
        if part is not None and not isinstance(part, nn.Identity):
            raise ValueError(f"elastic_block_from_vit: expected no {name}, got {type(part).__name__}")
    act = getattr(mlp, "act", None)
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        raise ValueError(f"elastic_block_from_vit: expected an exact nn.GELU, got {act}")
    (hidden, width), heads = mlp.fc1.weight.shape, attn.num_heads
    gammas = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls2")]
    if (gammas[0] is None) != (gammas[1] is None):
        raise ValueError("elastic_block_from_vit: expected ls1 and ls2 both or neither, got one of them")
    if attn.qkv.weight.shape != (3 * width, width) or width % heads:
        raise ValueError(
            f"elastic_block_from_vit: expected qkv [{3 * width}, {width}] for {heads} equal heads, "
            f"got {tuple(attn.qkv.weight.shape)}"
        )
    with torch.device("meta"):
        elastic = ElasticBlock(
            width,
            hidden,
            width // heads,
            eps=block.norm1.eps,
            layer_scale=None if gammas[0] is None else 1.0,
            qkv_bias=attn.qkv.bias is not None,
        )
    elastic.norm2.eps = block.norm2.eps
    theirs = dict(block.named_parameters())
    mine = dict(elastic.named_parameters())
    if theirs.keys() != mine.keys():
        odd = ", ".join(sorted(theirs.keys() ^ mine.keys()))
        raise ValueError(
            f"elastic_block_from_vit: expected the parameters of a plain block, differs in {odd}"
        )
    for name in mine:
        owner, _, leaf = name.rpartition(".")
        setattr(elastic.get_submodule(owner), leaf, theirs[name])
    return elastic
