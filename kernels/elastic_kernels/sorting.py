"""Chosen channels: one-time permutations of trained layers, after which the chosen ones are prefixes.

A network whose channels, heads or hidden units are sorted by importance computes the same, and its prefixes
are its most important parts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastic_kernels.blocks import ElasticBlock, ElasticBottleneck, ElasticSwinBlock
from elastic_kernels.modules import ElasticAttention, ElasticMLP, ElasticWindowAttention, LayerScale
from elastic_kernels.vit_layers import ElasticPatchEmbed, ElasticPreNormBlock, ElasticRMSNorm, ElasticSwiGLU

Attention = ElasticAttention | ElasticWindowAttention
Mlp = ElasticMLP | ElasticSwiGLU


@torch.no_grad()
def sort_linear(
    layer: nn.Linear | nn.Conv2d, *, inputs: Tensor | None = None, outputs: Tensor | None = None
) -> None:
    """Sort the inputs or the outputs of a linear layer or a convolution in place.

    Afterwards `layer(x[..., inputs]) == layer(x)[..., outputs]`, both as before.

    Args:
        layer: its weight is `[out, in]` or `[out, in, h, w]`.
        inputs, outputs: int64 permutations `[in]` and `[out]`; None leaves the order.

    Raises:
        ValueError: no permutation of so many.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticLinear, sort_linear
        >>> layer, x, order = ElasticLinear(4, 3), torch.randn(2, 4), torch.tensor([2, 0, 3, 1])
        >>> before = layer(x)
        >>> sort_linear(layer, inputs=order)
        >>> torch.allclose(layer(x[:, order]), before)
        True
    """
    if inputs is not None:
        _permute(layer.weight, inputs, 1)
    if outputs is not None:
        for parameter in (layer.weight, layer.bias):
            _permute(parameter, outputs)


@torch.no_grad()
def sort_channels(module: nn.Module, order: Tensor) -> None:
    """Sort the channels of the residual stream in place: those that a module reads and those that it makes.

    Afterwards `module(x[..., order]) == module(x)[..., order]`, as before. Sort all modules of a stream, the
    embedding before it, and the inputs of what reads it (`sort_linear`).

    Args:
        module: a norm of the layer kind or RMS, attention, an MLP, `LayerScale`, a block of a transformer, or
            `ElasticPatchEmbed`, which reads no channels.
        order: int64 permutation of the channels, the most important first.

    Raises:
        ValueError: no permutation of so many.
        TypeError: another kind of module.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBlock, sort_channels
        >>> block, x, order = ElasticBlock(32, 64, 16), torch.randn(5, 32), torch.randperm(32)
        >>> before = block(x, [(1, 5)])
        >>> sort_channels(block, order)
        >>> torch.allclose(block(x[:, order], [(1, 5)]), before[:, order], atol=1e-5)
        True
    """
    if isinstance(module, nn.LayerNorm | ElasticRMSNorm | LayerScale):
        for parameter in module.parameters():
            _permute(parameter, order)
    elif isinstance(module, Attention):
        sort_linear(module.qkv, inputs=order)
        sort_linear(module.proj, outputs=order)
    elif isinstance(module, Mlp):
        sort_linear(module.fc1, inputs=order)
        sort_linear(module.fc2, outputs=order)
    elif isinstance(module, ElasticBlock | ElasticSwinBlock | ElasticPreNormBlock):
        for child in module.children():
            sort_channels(child, order)
    elif isinstance(module, ElasticPatchEmbed):
        sort_linear(module.proj, outputs=order)
    else:
        raise TypeError(f"sort_channels: expected a layer of a transformer, got {type(module).__name__}")


@torch.no_grad()
def sort_heads(attention: ElasticAttention | ElasticWindowAttention, order: Tensor) -> None:
    """Sort the heads of attention in place; it computes the same.

    Args:
        attention: elastic attention, or that within windows.
        order: int64 permutation of the heads, the most important first.

    Raises:
        ValueError: no permutation of so many.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticAttention, sort_heads
        >>> attention, x = ElasticAttention(32, 8), torch.randn(5, 32)
        >>> before = attention(x, [(1, 5)])
        >>> sort_heads(attention, torch.tensor([2, 0, 3, 1]))
        >>> torch.allclose(attention(x, [(1, 5)]), before, atol=1e-5)
        True
    """
    dim = attention.head_dim
    heads = attention.qkv.out_features // (3 * dim)
    _check(order, heads)
    channels = (order.unsqueeze(1) * dim + torch.arange(dim, device=order.device)).flatten()
    stacked = torch.cat([channels + group * heads * dim for group in range(3)])
    sort_linear(attention.qkv, outputs=stacked)
    sort_linear(attention.proj, inputs=channels)
    if isinstance(attention, ElasticWindowAttention):
        _permute(attention.relative_position_bias_table, order, 1)


@torch.no_grad()
def sort_hidden(mlp: ElasticMLP | ElasticSwiGLU, order: Tensor) -> None:
    """Sort the hidden units of an MLP in place; it computes the same.

    Args:
        mlp: with or without a gate, whose halves are sorted alike.
        order: int64 permutation of the hidden units, the most important first.

    Raises:
        ValueError: no permutation of so many.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticMLP, sort_hidden
        >>> mlp, x = ElasticMLP(8, 32), torch.randn(5, 8)
        >>> before, importance = mlp(x), torch.rand(32)
        >>> sort_hidden(mlp, importance.argsort(descending=True))
        >>> torch.allclose(mlp(x), before, atol=1e-5)
        True
    """
    hidden = mlp.fc2.in_features
    _check(order, hidden)
    rows = order if isinstance(mlp, ElasticMLP) else torch.cat([order, order + hidden])
    sort_linear(mlp.fc1, outputs=rows)
    sort_linear(mlp.fc2, inputs=order)


@torch.no_grad()
def sort_middle(block: ElasticBottleneck, first: Tensor, second: Tensor) -> None:
    """Sort the middle channels of a bottleneck in place; it computes the same.

    A group of a norm stays a group, as its channels share their mean and variance: groups change places, and
    channels within them.

    Args:
        block: of a ResNet.
        first, second: int64 permutations of the channels before and after the 3x3 convolution, the most
            important first.

    Raises:
        ValueError: no permutation of so many, or one that takes groups apart.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBottleneck, sort_middle
        >>> block, x = ElasticBottleneck(16, 8, 16, groups=4), torch.randn(1, 3, 3, 16)
        >>> before = block(x, middle=8)
        >>> sort_middle(block, torch.tensor([5, 4, 0, 1, 6, 7, 2, 3]), torch.arange(8))
        >>> torch.allclose(block(x, middle=8), before, atol=1e-5)
        True
    """
    orders, norms = (first, second), (block.norm1, block.norm2)
    for norm, order in zip(norms, orders, strict=True):
        _check(order, norm.num_channels)
        size = norm.num_channels // norm.num_groups
        groups = order.view(-1, size) // size
        if (groups != groups[:, :1]).any():
            raise ValueError(f"sort_middle: expected groups of {size} channels to stay together")
    sort_linear(block.conv1, outputs=first)
    sort_linear(block.conv2, inputs=first, outputs=second)
    sort_linear(block.conv3, inputs=second)
    for norm, order in zip(norms, orders, strict=True):
        for parameter in norm.parameters():
            _permute(parameter, order)


def _check(order: Tensor, count: int) -> None:
    whole = torch.arange(count, device=order.device)
    if order.shape != whole.shape or order.dtype != torch.int64 or not order.sort().values.equal(whole):
        got = f"{order.flatten()[:8].tolist()}{'...' if order.numel() > 8 else ''}, {order.dtype}"
        raise ValueError(f"order: expected a permutation of 0..{count - 1} in int64, got {got}")


def _permute(parameter: Tensor | None, order: Tensor, axis: int = 0) -> None:
    if parameter is not None:
        _check(order, parameter.shape[axis])
        parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))
