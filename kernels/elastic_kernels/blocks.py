"""Elastic blocks as `nn.Module`s: of a vision transformer, of a Swin transformer, of a ResNet.

Parameter names are those of timm.
"""

from __future__ import annotations

from torch import Tensor, nn

from elastic_kernels import validate
from elastic_kernels.attention import Groups
from elastic_kernels.halves import AttentionWeights, MlpWeights, elastic_attention_half, elastic_mlp_half
from elastic_kernels.layouts import KeptRows, Sequences, Windows
from elastic_kernels.linear import Scale, elastic_linear, factor
from elastic_kernels.mlp import active_hidden
from elastic_kernels.modules import (
    ElasticAttention,
    ElasticGroupNorm,
    ElasticLayerNorm,
    ElasticMLP,
    ElasticWindowAttention,
    LayerScale,
    Maps,
    conv_channels_last,
    static_linear,
    static_norm,
)
from elastic_kernels.rotary import Rotary
from elastic_kernels.vit_layers import ElasticSwiGLU


class ElasticBlock(nn.Module):
    """Pre-norm transformer block on packed tokens of any width up to its own.

    Args:
        width, hidden: of the largest network.
        head_dim: channels of a head.
        eps: of both norms.
        layer_scale: initial LayerScale; None means none.
        qkv_bias: whether the q, k and v projections have a bias.
        heads: of the largest network; default `width / head_dim`.
        scale: of all four layers, as in `elastic_linear`.
        gate: the MLP is an `ElasticSwiGLU`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBlock
        >>> block = ElasticBlock(64, 256, 16, layer_scale=1e-5)
        >>> block(torch.randn(16, 32), [(2, 5), (3, 2)]).shape
        torch.Size([16, 32])
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
        heads: int | None = None,
        scale: Scale = "offset",
        gate: bool = False,
    ):
        super().__init__()
        validate.sizes(self, width=width, hidden=hidden, head_dim=head_dim, heads=heads)
        self.norm1 = ElasticLayerNorm(width, eps=eps)
        self.attn = ElasticAttention(width, head_dim, qkv_bias, heads=heads, scale=scale)
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = ElasticLayerNorm(width, eps=eps)
        self.mlp = (ElasticSwiGLU if gate else ElasticMLP)(width, hidden, scale=scale)
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        kept: tuple[KeptRows, KeptRows] | None = None,
        only: Tensor | None = None,
        inplace: bool = False,
        hidden: int | None = None,
        heads: int | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: `[tokens, w]`.
            groups: `(count, length)` of each length class in packing order, or offsets, as of
                `packed_attention`.
            kept: the sequences that take part in the attention half and in the MLP half.
            only: int64 `[live]`, distinct tokens that are wanted (of a last block): the projection and the
                MLP are computed for these alone.
            inplace: the result may overwrite `x`, which is not used elsewhere.
            hidden, heads: in use; default the share of each that `w` has of the largest width.
            rotary: angles of all tokens, by which queries and keys are turned, as of `Sequences`.

        Returns:
            `[tokens, w]`, or with `only` `[live, w]`; the dtype of `x`.
        """
        first, second = kept or (None, None)
        tokens, row_scale = x.shape[0], None
        x = elastic_attention_half(
            x, _attention_weights(self.norm1, self.attn, self.ls1), Sequences(groups, rotary),
            head_dim=self.attn.head_dim, eps=self.norm1.eps, kept=first, only=only, inplace=inplace,
            heads=heads, scale=self.attn.scale,
        )  # fmt: skip
        if second and only is not None:
            (_, row_scale), second = second.among(only, tokens), None
        return elastic_mlp_half(
            x, _mlp_weights(self.norm2, self.mlp, self.ls2),
            eps=self.norm2.eps, kept=second, row_scale=row_scale, inplace=True,
            hidden=hidden, scale=self.mlp.scale, gate=isinstance(self.mlp, ElasticSwiGLU),
        )  # fmt: skip

    def scaled_layers(self) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Weights, biases and gammas of the layers that LayerScale follows, for `working_weights`."""
        pairs = [(self.attn.proj, self.ls1), (self.mlp.fc2, self.ls2)]
        return [(layer.weight, layer.bias, scale.gamma) for layer, scale in pairs if scale is not None]

    def static_state(
        self, width: int, *, hidden: int | None = None, heads: int | None = None
    ) -> dict[str, Tensor]:
        """The block at one size as a block of its own: prefixes of its weights, with their scales in them."""
        scales = {"ls1.gamma": self.ls1, "ls2.gamma": self.ls2}
        gammas = {name: scale.gamma[:width] for name, scale in scales.items() if scale is not None}
        return gammas | _static_layers(self, width, hidden, heads)


def _attention_weights(
    norm: nn.LayerNorm, attn: ElasticAttention | ElasticWindowAttention, scale: LayerScale | None
) -> AttentionWeights:
    qkv, proj, gamma = attn.qkv, attn.proj, None if scale is None else scale.gamma
    return AttentionWeights(norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, gamma)


def _mlp_weights(norm: nn.LayerNorm, mlp: ElasticMLP | ElasticSwiGLU, scale: LayerScale | None) -> MlpWeights:
    fc1, fc2, gamma = mlp.fc1, mlp.fc2, None if scale is None else scale.gamma
    return MlpWeights(norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, gamma)


def _static_layers(
    block: ElasticBlock | ElasticSwinBlock, width: int, hidden: int | None = None, heads: int | None = None
) -> dict[str, Tensor]:
    """The corners of a block's linears and the entries of its norms."""
    attn, mlp, op = block.attn, block.mlp, "static_state"
    halves = 2 if isinstance(mlp, ElasticSwiGLU) else 1
    hidden = active_hidden(op, hidden, mlp.fc1.weight[: mlp.fc2.in_features], width)
    inner = validate.heads(op, heads, attn.qkv.weight, attn.head_dim, width) * attn.head_dim
    layers = {
        "attn.qkv": static_linear(attn.qkv, inner, width, groups=3, scale=attn.scale),
        "attn.proj": static_linear(attn.proj, width, inner, scale=attn.scale),
        "mlp.fc1": static_linear(mlp.fc1, hidden, width, groups=halves, scale=mlp.scale),
        "mlp.fc2": static_linear(mlp.fc2, width, hidden, scale=mlp.scale),
        "norm1": static_norm(block.norm1, width),
        "norm2": static_norm(block.norm2, width),
    }
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.items()}


class ElasticSwinBlock(nn.Module):
    """Pre-norm Swin block on packed maps of any width up to its own.

    Args:
        width, hidden: of the largest network.
        head_dim, window, shift, heads: as of `ElasticWindowAttention`.
        eps: of both norms.
        scale: of all four layers, as in `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticSwinBlock
        >>> block = ElasticSwinBlock(64, 256, 16, window=3, shift=1)
        >>> block(torch.randn(50, 32), [(2, 5, 5)]).shape
        torch.Size([50, 32])
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        head_dim: int,
        window: int,
        shift: int,
        *,
        heads: int | None = None,
        eps: float = 1e-5,
        scale: Scale = "offset",
    ):
        super().__init__()
        validate.sizes(self, width=width, hidden=hidden)
        self.norm1 = ElasticLayerNorm(width, eps=eps)
        self.attn = ElasticWindowAttention(width, head_dim, window, shift, heads=heads, scale=scale)
        self.norm2 = ElasticLayerNorm(width, eps=eps)
        self.mlp = ElasticMLP(width, hidden, scale=scale)

    def forward(
        self,
        x: Tensor,
        maps: Maps,
        kept: tuple[KeptRows, KeptRows] | None = None,
        inplace: bool = False,
        hidden: int | None = None,
        heads: int | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: `[tokens, w]`, the positions of all maps row by row.
            maps: `(count, height, width)` of each group of maps in packing order.
            kept: the maps that take part in the attention half and in the MLP half.
            inplace, hidden, heads: as of `ElasticBlock`.

        Returns:
            `[tokens, w]`, the dtype of `x`.
        """
        first, second = kept or (None, None)
        attn = self.attn
        x = elastic_attention_half(
            x, _attention_weights(self.norm1, attn, None),
            Windows(maps, attn.window, attn.shift, attn.bias()),
            head_dim=attn.head_dim, eps=self.norm1.eps, kept=first, inplace=inplace, heads=heads,
            scale=attn.scale,
        )  # fmt: skip
        return elastic_mlp_half(
            x, _mlp_weights(self.norm2, self.mlp, None),
            eps=self.norm2.eps, kept=second, inplace=True, hidden=hidden, scale=self.mlp.scale,
        )  # fmt: skip

    def static_state(
        self, width: int, *, hidden: int | None = None, heads: int | None = None
    ) -> dict[str, Tensor]:
        """As `ElasticBlock.static_state`."""
        attn = self.attn
        heads = validate.heads("static_state", heads, attn.qkv.weight, attn.head_dim, width)
        table = attn.relative_position_bias_table[:, :heads]
        return {"attn.relative_position_bias_table": table} | _static_layers(self, width, hidden, heads)


class ElasticBottleneck(nn.Module):
    """ResNet bottleneck with group norm on channels-last maps; the channels of its middle are elastic.

    Args:
        entry: channels of the input.
        middle: of the largest network's 3x3 convolution.
        out: channels of the output.
        groups: of the norms, whatever the width.
        stride: of the 3x3 convolution.
        shortcut: the input is projected before it is added, as where its shape differs from the output's.
        eps: of the norms.
        scale: of the products over the middle's channels, as in `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBottleneck
        >>> block = ElasticBottleneck(64, 16, 64, groups=4)
        >>> block(torch.randn(2, 8, 8, 64), middle=12).shape
        torch.Size([2, 8, 8, 64])
    """

    def __init__(
        self,
        entry: int,
        middle: int,
        out: int,
        groups: int,
        *,
        stride: int = 1,
        shortcut: bool = False,
        eps: float = 1e-5,
        scale: Scale = "offset",
    ):
        super().__init__()
        validate.sizes(self, entry=entry, middle=middle, out=out, groups=groups, stride=stride)
        self.stride, self.scale = stride, scale
        self.conv1 = nn.Linear(entry, middle, bias=False)
        self.norm1 = ElasticGroupNorm(groups, middle, eps=eps)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.norm2 = ElasticGroupNorm(groups, middle, eps=eps)
        self.conv3 = nn.Linear(middle, out, bias=False)
        self.norm3 = ElasticGroupNorm(groups, out, eps=eps)
        self.downsample = (
            nn.Sequential(nn.Linear(entry, out, bias=False), ElasticGroupNorm(groups, out, eps=eps))
            if shortcut
            else None
        )

    def forward(self, x: Tensor, middle: int) -> Tensor:
        """One block.

        Args:
            x: `[N, H, W, entry]`.
            middle: active channels of the 3x3 convolution, a multiple of `groups`.

        Returns:
            `[N, ceil(H / stride), ceil(W / stride), out]`, the dtype of matrix products.
        """
        h = elastic_linear(x, self.conv1.weight, out_features=middle, scale=None)
        h = self.norm1(h, activation="relu")
        kernel = self.conv2.weight[:middle, :middle]
        h = conv_channels_last(h, kernel, stride=self.stride, padding=1)
        # The scale of the convolution: the norm takes it from there.
        scale = factor(self.scale, self.conv2.in_channels, middle)
        h = self.norm2(h, activation="relu", scale=scale)
        identity = x if self.downsample is None else self._projected(x)
        h = elastic_linear(h, self.conv3.weight, scale=self.scale)
        return self.norm3(h, residual=identity.to(h.dtype), activation="relu")

    def _projected(self, x: Tensor) -> Tensor:
        assert self.downsample is not None
        linear, norm = self.downsample
        assert isinstance(linear, nn.Linear)
        return norm(elastic_linear(x[:, :: self.stride, :: self.stride], linear.weight, scale=None))

    def static_state(self, middle: int) -> dict[str, Tensor]:
        """The block at one width as a block of its own: prefixes of its weights, offset scales folded in."""
        entry, out, largest = self.conv1.in_features, self.conv3.out_features, self.conv2.in_channels
        layers = {
            "conv1": static_linear(self.conv1, middle, entry, scale=None),
            "norm1": static_norm(self.norm1, middle),
            "conv2": {"weight": self.conv2.weight[:middle, :middle] * factor(self.scale, largest, middle)},
            "norm2": static_norm(self.norm2, middle),
            "conv3": static_linear(self.conv3, out, middle, scale=self.scale),
            "norm3": static_norm(self.norm3, out),
        }
        if self.downsample is not None:
            layers["downsample"] = self.downsample.state_dict()
        return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.items()}
