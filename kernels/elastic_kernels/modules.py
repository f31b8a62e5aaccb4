"""Elastic layers as `nn.Module`s: they hold the largest network's parameters and nothing about a subnet.

The width is that of the input. Parameter names are those of timm's vision transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kernels import validate
from elastic_kernels.attention import Groups, packed_attention
from elastic_kernels.dispatch import autocast_operands
from elastic_kernels.group_norm import elastic_group_norm
from elastic_kernels.layer_norm import elastic_layer_norm
from elastic_kernels.linear import Scale, elastic_linear, elastic_qkv, factor
from elastic_kernels.mlp import elastic_mlp
from elastic_kernels.window_attention import relative_position_bias, window_attention

Maps = Sequence[tuple[int, int, int]]


class ElasticLinear(nn.Linear):
    """`nn.Linear` that takes inputs of any width up to `in_features`; see `elastic_linear`.

    Args:
        in_features, out_features, bias, options: as of `nn.Linear`.
        scale: of the product, as in `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticLinear
        >>> ElasticLinear(48, 64)(torch.randn(5, 32), out_features=40).shape
        torch.Size([5, 40])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scale: Scale = "offset",
        **options: Any,
    ):
        validate.sizes(self, in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias, **options)
        self.scale = scale

    def forward(self, x: Tensor, out_features: int | None = None) -> Tensor:
        """`[..., in]` -> `[..., out_features]`, by default all."""
        return elastic_linear(x, self.weight, self.bias, out_features=out_features, scale=self.scale)


class ElasticLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over inputs of any width up to its own; see `elastic_layer_norm`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticLayerNorm
        >>> ElasticLayerNorm(64)(torch.randn(5, 32)).shape
        torch.Size([5, 32])
    """

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """`[..., w]` -> the same shape; with `rows` `[tokens, w]` -> `[kept, w]`."""
        return elastic_layer_norm(x, self.weight, self.bias, self.eps, rows=rows)


class ElasticAttention(nn.Module):
    """Self-attention with the first heads of shared projections.

    Args:
        width: of the largest network.
        head_dim: channels of a head.
        qkv_bias: whether the q, k and v projections have a bias.
        heads: of the largest network; default `width / head_dim`.
        scale: of both projections, as in `elastic_linear`.
        proj_bias: whether the output projection has a bias.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticAttention
        >>> ElasticAttention(64, 16)(torch.randn(10, 32), [(2, 5)]).shape
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
    ):
        super().__init__()
        validate.sizes(self, width=width, head_dim=head_dim, heads=heads)
        inner = _channels_of_heads(width, head_dim, heads)
        self.head_dim, self.scale = head_dim, scale
        self.qkv = nn.Linear(width, 3 * inner, bias=qkv_bias)
        self.proj = ElasticLinear(inner, width, proj_bias, scale=scale)

    def forward(self, x: Tensor, groups: Groups, heads: int | None = None) -> Tensor:
        """`[tokens, w]` -> `[tokens, w]` within each sequence.

        Args:
            groups: `(count, length)` pairs, or offsets, as of `packed_attention`.
            heads: in use; default the share that `w` has of the largest width.
        """
        qkv, dim = self.qkv, self.head_dim
        heads = validate.heads("ElasticAttention", heads, qkv.weight, dim, x.shape[-1])
        h = elastic_qkv(x, qkv.weight, qkv.bias, out_features=heads * dim, scale=self.scale)
        return self.proj(packed_attention(h.unflatten(-1, (heads, dim)), groups), out_features=x.shape[-1])


def _channels_of_heads(width: int, head_dim: int, heads: int | None) -> int:
    """Of all together; without a number of heads, those of the width, of which it must be a multiple."""
    if heads is None and width % head_dim:
        raise ValueError(f"width: expected a multiple of head_dim {head_dim}, got {width}")
    return width if heads is None else heads * head_dim


class ElasticMLP(nn.Module):
    """Two linears around an activation; see `elastic_mlp`.

    Args:
        width, hidden: of the largest network.
        bias: whether both layers have one.
        scale, activation: of both layers, and between them, as in `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticMLP
        >>> ElasticMLP(64, 256)(torch.randn(10, 32)).shape
        torch.Size([10, 32])
    """

    def __init__(
        self, width: int, hidden: int, *, bias: bool = True, scale: Scale = "offset", activation: str = "gelu"
    ):
        super().__init__()
        validate.sizes(self, width=width, hidden=hidden)
        self.scale, self.activation = scale, activation
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, hidden: int | None = None) -> Tensor:
        """`[..., w]` -> `[..., w]` with `hidden` units, by default the share that `w` has."""
        layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return elastic_mlp(x, *layers, hidden=hidden, scale=self.scale, activation=self.activation)


class LayerScale(nn.Module):
    """A trained factor of each channel of a branch.

    Args:
        width: of the largest network.
        initial: value of all factors.

    Example:
        >>> from elastic_kernels import LayerScale
        >>> LayerScale(64, 1e-5).gamma.shape
        torch.Size([64])
    """

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))


def static_linear(
    layer: nn.Linear, out_features: int, in_features: int, *, groups: int = 1, scale: Scale = "offset"
) -> dict[str, Tensor]:
    """The corner of a linear that a subnet uses, times its scale, under the names of `nn.Linear`.

    The layer's output is `groups` equal parts, of each of which `out_features` are used.
    """
    corner = layer.weight.unflatten(0, (groups, -1))[:, :out_features, :in_features]
    state = {"weight": corner.flatten(0, 1) * factor(scale, layer.in_features, in_features)}
    if layer.bias is not None:
        state["bias"] = layer.bias.unflatten(0, (groups, -1))[:, :out_features].flatten()
    return state


def static_norm(norm: nn.LayerNorm | nn.GroupNorm, width: int) -> dict[str, Tensor]:
    """The entries of a norm's parameters that a subnet uses."""
    return {name: parameter[:width] for name, parameter in norm.named_parameters()}


class ElasticWindowAttention(nn.Module):
    """Self-attention within the windows of maps, with the first heads of shared projections.

    Args:
        width: of the largest network.
        head_dim: channels of a head.
        window: side of a window, in tokens.
        shift: of the windows, in tokens, towards the bottom right.
        heads, scale: as of `ElasticAttention`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticWindowAttention
        >>> attn = ElasticWindowAttention(64, 16, window=3, shift=1)
        >>> attn(torch.randn(50, 32), [(2, 5, 5)]).shape
        torch.Size([50, 32])
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        window: int,
        shift: int,
        *,
        heads: int | None = None,
        scale: Scale = "offset",
    ):
        super().__init__()
        validate.sizes(self, width=width, head_dim=head_dim, heads=heads, window=window)
        if not 0 <= shift < window:
            raise ValueError(f"{type(self).__name__}: expected shift in 0..{window - 1}, got {shift!r}")
        inner = _channels_of_heads(width, head_dim, heads)
        self.head_dim, self.window, self.shift, self.scale = head_dim, window, shift, scale
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = ElasticLinear(inner, width, scale=scale)
        table = torch.zeros((2 * window - 1) ** 2, inner // head_dim)
        self.relative_position_bias_table = nn.Parameter(table)

    def forward(self, x: Tensor, maps: Maps, heads: int | None = None) -> Tensor:
        """`[tokens, w]` -> `[tokens, w]` within each window.

        Args:
            maps: `(count, height, width)` of each group of maps in packing order.
            heads: in use; default the share that `w` has of the largest width.
        """
        heads = validate.heads("ElasticWindowAttention", heads, self.qkv.weight, self.head_dim, x.shape[-1])
        inner = heads * self.head_dim
        qkv = elastic_qkv(x, self.qkv.weight, self.qkv.bias, out_features=inner, scale=self.scale)
        qkv = qkv.unflatten(-1, (heads, self.head_dim))
        # Maps are padded with zeros, whose q, k and v are the biases.
        pad = self.qkv.bias.view(3, -1, self.head_dim)
        h = window_attention(qkv, self.bias(), pad, maps, window=self.window, shift=self.shift)
        return self.proj(h, out_features=x.shape[-1])

    def bias(self) -> Tensor:
        """The bias of scores, `[heads, window**2, window**2]`."""
        return relative_position_bias(self.relative_position_bias_table, self.window)


class ElasticGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` over channels-last inputs of any width up to its own; see `elastic_group_norm`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticGroupNorm
        >>> ElasticGroupNorm(2, 8)(torch.randn(2, 4, 4, 6), activation="relu").shape
        torch.Size([2, 4, 4, 6])
    """

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None, scale: float = 1.0
    ) -> Tensor:
        """`[N, ..., w]` -> the same shape; the norm of `scale * x`, with no pass over it."""
        return elastic_group_norm(
            x, self.weight, self.bias, self.num_groups, self.eps / scale**2,
            residual=residual, activation=activation,
        )  # fmt: skip


def conv_channels_last(x: Tensor, weight: Tensor, *, stride: int, padding: int) -> Tensor:
    """`[N, H, W, in]` -> `[N, H', W', out]` with a kernel `[out, in, h, w]`, by PyTorch's convolution."""
    x, weight = autocast_operands(x, weight)
    packed = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x.permute(0, 3, 1, 2), packed, stride=stride, padding=padding).permute(0, 2, 3, 1)
