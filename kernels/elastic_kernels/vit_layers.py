"""Elastic layers of today's vision transformers as `nn.Module`s, and a pre-norm block made of any of them.

RMSNorm, gated MLPs, norms of queries and keys, rotary embeddings, patch embedding and 1x1 convolution.
Parameter names are timm's; nothing is stored about a subnet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastic_kernels import validate
from elastic_kernels.attention import Groups, packed_attention
from elastic_kernels.embedding import patch_embedding
from elastic_kernels.linear import Scale, elastic_linear, elastic_qkv
from elastic_kernels.mlp import elastic_swiglu
from elastic_kernels.modules import ElasticAttention, ElasticLayerNorm, ElasticMLP, LayerScale
from elastic_kernels.qk_norm import qk_norm
from elastic_kernels.rms_norm import elastic_rms_norm
from elastic_kernels.rotary import Rotary


class ElasticRMSNorm(nn.Module):
    """RMSNorm over inputs of any width up to its own; see `elastic_rms_norm`.

    Args:
        width: of the largest network.
        eps: added to the mean square.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticRMSNorm
        >>> ElasticRMSNorm(64)(torch.randn(5, 32)).shape
        torch.Size([5, 32])
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        validate.sizes(self, width=width)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """`[..., w]` -> the same shape; with `rows` `[tokens, w]` -> `[kept, w]`."""
        return elastic_rms_norm(x, self.weight, self.eps, rows=rows)


class ElasticSwiGLU(nn.Module):
    """A gated MLP; see `elastic_swiglu`.

    Args:
        width, hidden: of the largest network.
        bias: whether both layers have one.
        scale: of both layers, as in `elastic_linear`.
        activation: of the gate.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticSwiGLU
        >>> ElasticSwiGLU(64, 96)(torch.randn(10, 32), hidden=40).shape
        torch.Size([10, 32])
    """

    def __init__(
        self, width: int, hidden: int, *, bias: bool = True, scale: Scale = "offset", activation: str = "silu"
    ):
        super().__init__()
        validate.sizes(self, width=width, hidden=hidden)
        self.scale, self.activation = scale, activation
        self.fc1 = nn.Linear(width, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, hidden: int | None = None) -> Tensor:
        """`[..., w]` -> `[..., w]` with `hidden` units, by default the share that `w` has."""
        layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return elastic_swiglu(x, *layers, hidden=hidden, scale=self.scale, activation=self.activation)


class ElasticRotaryAttention(ElasticAttention):
    """Self-attention with the first heads, perhaps with norms of queries and keys and a rotary embedding.

    Args:
        width, head_dim, qkv_bias, heads, scale, proj_bias: as of `ElasticAttention`.
        qk_norm: "layer" or "rms", over the channels of each head, or None.
        eps: of these norms.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticRotaryAttention, Rotary
        >>> rotary = Rotary.of_grid(2, 2, head_dim=16, prefix=1, count=2)
        >>> ElasticRotaryAttention(64, 16, qk_norm="rms")(torch.randn(10, 32), [(2, 5)], rotary=rotary).shape
        torch.Size([10, 32])
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        qkv_bias: bool = True,
        *,
        heads: int | None = None,
        scale: Scale = "offset",
        proj_bias: bool = True,
        qk_norm: str | None = None,
        eps: float = 1e-6,
    ):
        super().__init__(width, head_dim, qkv_bias, heads=heads, scale=scale, proj_bias=proj_bias)
        if qk_norm not in (None, "layer", "rms"):
            raise ValueError(f"qk_norm: expected 'layer', 'rms' or None, got {qk_norm!r}")
        kind = ElasticRMSNorm if qk_norm == "rms" else ElasticLayerNorm
        self.q_norm = None if qk_norm is None else kind(head_dim, eps)
        self.k_norm = None if qk_norm is None else kind(head_dim, eps)

    def forward(
        self, x: Tensor, groups: Groups, heads: int | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        """As `ElasticAttention.forward`; `rotary` has the angles of all tokens."""
        qkv, dim = self.qkv, self.head_dim
        heads = validate.heads("ElasticRotaryAttention", heads, qkv.weight, dim, x.shape[-1])
        h = elastic_qkv(x, qkv.weight, qkv.bias, out_features=heads * dim, scale=self.scale)
        h = self.before_attention(h.unflatten(-1, (heads, dim)), rotary)
        return self.proj(packed_attention(h, groups), out_features=x.shape[-1])

    def before_attention(self, qkv: Tensor, rotary: Rotary | None) -> Tensor:
        """Norm and turn queries and keys of `[tokens, 3, heads, head_dim]`."""
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        if not norms:
            return qkv if rotary is None else qk_norm(qkv, rotary=rotary)
        biases = tuple(norm.bias for norm in norms if isinstance(norm, ElasticLayerNorm))
        weight = torch.stack(tuple(norm.weight for norm in norms))
        return qk_norm(qkv, weight, torch.stack(biases) if biases else None, norms[0].eps, rotary=rotary)


class ElasticPreNormBlock(nn.Module):
    """A pre-norm transformer block made of any elastic layers.

    `x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))`. `ElasticBlock` is the one of LayerNorm, plain
    attention and a GELU, with fused kernels for its halves.

    Args:
        norm1, norm2: `ElasticLayerNorm` or `ElasticRMSNorm`.
        attn: `ElasticAttention` or `ElasticRotaryAttention`.
        mlp: `ElasticMLP` or `ElasticSwiGLU`.
        ls1, ls2: `LayerScale`, or None.

    Example:
        >>> import torch
        >>> import elastic_kernels as ek
        >>> attn = ek.ElasticRotaryAttention(64, 16, qk_norm="rms")
        >>> norms = ek.ElasticRMSNorm(64), ek.ElasticRMSNorm(64)
        >>> block = ek.ElasticPreNormBlock(norms[0], attn, norms[1], ek.ElasticSwiGLU(64, 96))
        >>> rotary = ek.Rotary.of_grid(2, 2, head_dim=16, prefix=1, count=2)
        >>> block(torch.randn(10, 32), [(2, 5)], hidden=40, rotary=rotary).shape
        torch.Size([10, 32])
    """

    def __init__(
        self,
        norm1: nn.Module,
        attn: ElasticAttention,
        norm2: nn.Module,
        mlp: ElasticMLP | ElasticSwiGLU,
        ls1: LayerScale | None = None,
        ls2: LayerScale | None = None,
    ):
        super().__init__()
        self.norm1, self.attn, self.ls1 = norm1, attn, ls1
        self.norm2, self.mlp, self.ls2 = norm2, mlp, ls2

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        *,
        hidden: int | None = None,
        heads: int | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: `[tokens, w]`, packed tokens.
            groups: as of `packed_attention`.
            hidden, heads: in use; default the share of each that `w` has of the largest width.
            rotary: angles of all tokens.

        Returns:
            `[tokens, w]`, the dtype of `x`.
        """
        options = {} if rotary is None else {"rotary": rotary}
        x = x + scaled(self.ls1, self.attn(self.norm1(x), groups, heads, **options), x)
        return x + scaled(self.ls2, self.mlp(self.norm2(x), hidden), x)


def scaled(scale: LayerScale | None, branch: Tensor, x: Tensor) -> Tensor:
    """A branch to be added to `x`, times LayerScale if there is one, in the dtype of `x`."""
    return (branch if scale is None else branch * scale.gamma[: x.shape[1]]).to(x.dtype)


class ElasticPatchEmbed(nn.Module):
    """Non-overlapping patches to tokens of the asked width.

    Args:
        patch_size: pixels of a side.
        width: of the largest network.
        channels: of the images.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticPatchEmbed
        >>> ElasticPatchEmbed(8, 64)(torch.randn(2, 3, 16, 32), 48).shape
        torch.Size([2, 8, 48])
    """

    def __init__(self, patch_size: int, width: int, channels: int = 3):
        super().__init__()
        validate.sizes(self, patch_size=patch_size, width=width, channels=channels)
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor, width: int) -> Tensor:
        """`[B, channels, H, W]` -> `[B, patches, width]`; H and W multiples of the patch size."""
        assert self.proj.bias is not None
        op = "ElasticPatchEmbed"
        validate.prefix(op, "width", width, self.proj.out_channels)
        validate.operands(op, images=images, weight=self.proj.weight)
        return patch_embedding(op, images, self.proj.weight, self.proj.bias, width)


class ElasticConv1x1(nn.Conv2d):
    """A 1x1 convolution over maps of any number of channels up to its own: `elastic_linear` in each position.

    Maps in channels-last memory are not copied.

    Args:
        in_channels, out_channels: of the largest network.
        bias: whether it has one.
        scale: as in `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticConv1x1
        >>> ElasticConv1x1(48, 64)(torch.randn(2, 32, 5, 7), out_channels=40).shape
        torch.Size([2, 40, 5, 7])
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, *, scale: Scale = "offset"):
        validate.sizes(self, in_channels=in_channels, out_channels=out_channels)
        super().__init__(in_channels, out_channels, 1, bias=bias)
        self.scale = scale

    def forward(self, x: Tensor, out_channels: int | None = None) -> Tensor:
        """`[N, in, H, W]` -> `[N, out_channels, H, W]`, by default all."""
        if x.dim() != 4:
            raise ValueError(f"ElasticConv1x1: expected x [N, in, H, W], got {list(x.shape)}")
        weight = self.weight.flatten(1)
        y = elastic_linear(
            x.permute(0, 2, 3, 1), weight, self.bias, out_features=out_channels, scale=self.scale
        )
        return y.permute(0, 3, 1, 2)
