"""Elastic embedding of a vision transformer: crops to packed tokens.

    tokens of a crop = [class token, registers, s] + positions
    s = patches W[:w]^T + b[:w], or the mask token where a patch is masked

The Triton kernels are in `triton_ops/embedding.py`. Source: ViT (Dosovitskiy et al., 2021); masks as of iBOT
(Zhou et al., 2022).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate
from elastic_kernels.linear import elastic_linear, linear_backend


class EmbeddingWeights(NamedTuple):
    """Parameters of an embedding, of the largest network, C wide.

    Attributes:
        weight, bias: `[C, channels, p, p]` and `[C]`, of a convolution whose stride is the side of a patch.
        cls_token: `[1, 1, C]`.
        registers: `[1, registers, C]` or None.
        positions: `[1, 1 + registers + patches, C]`.
        mask_token: `[1, C]` or None.

    Example:
        >>> import torch
        >>> from elastic_kernels import EmbeddingWeights
        >>> EmbeddingWeights(torch.zeros(8, 3, 2, 2), torch.zeros(8), torch.zeros(1, 1, 8), None,
        ...                  torch.zeros(1, 5, 8)).prefix
        1
    """

    weight: Tensor
    bias: Tensor
    cls_token: Tensor
    registers: Tensor | None
    positions: Tensor
    mask_token: Tensor | None = None

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 if self.registers is None else 1 + self.registers.shape[1]


def elastic_embedding(
    crops: Sequence[Tensor],
    weights: EmbeddingWeights,
    width: int,
    *,
    masks: Sequence[Tensor | None] | None = None,
    resizings: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Embed groups of crops, one after the other, in one tensor.

    Args:
        crops: `[crops, channels, H, W]` of each group, sides multiples of the patch size.
        weights: of the largest network.
        width: channels in use.
        masks: bool `[crops, patches]` of each group, True where the mask token stands for the patch; or None.
        resizings: of each group the matrix `[patches, trained patches]` that makes the positions of its
            patches, or None for the trained ones.

    Returns:
        `[tokens, width]`, of the wider of the dtypes of products and positions.

    Raises:
        ValueError: a width outside the weights, or a mask without a mask token.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: as of `elastic_linear`; gradients of tokens and positions are fp32 sums. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import EmbeddingWeights, elastic_embedding
        >>> weights = EmbeddingWeights(torch.randn(8, 3, 2, 2), torch.zeros(8), torch.zeros(1, 1, 8), None,
        ...                            torch.zeros(1, 5, 8))
        >>> elastic_embedding([torch.randn(6, 3, 4, 4)], weights, 4).shape
        torch.Size([30, 4])
    """
    op, groups = "elastic_embedding", len(crops)
    masks, resizings = masks or [None] * groups, resizings or [None] * groups
    validate.prefix(op, "width", width, weights.weight.shape[0])
    validate.operands(op, **{f"crops {i}": c for i, c in enumerate(crops)}, weight=weights.weight)
    for crop in crops:
        _check_images(op, crop, weights.weight)
    if weights.mask_token is None and any(mask is not None for mask in masks):
        raise ValueError("mask: expected None for a ViT without a mask token, got a mask")
    if linear_backend(op, crops[0]).backend == "triton":
        from elastic_kernels.triton_ops.embedding import EmbeddingFunction

        patches = _patches(crops, weights.weight.shape[-1])
        y = elastic_linear(patches, weights.weight.flatten(1), weights.bias, out_features=width, scale=None)
        sizes = [len(crop) for crop in crops]
        return EmbeddingFunction.apply(y, *weights[2:], weights.prefix, sizes, list(masks), list(resizings))
    parts = zip(crops, masks, resizings, strict=True)
    return torch.cat([_reference(*part, weights, width).flatten(0, 1) for part in parts])


def _check_images(op: str, images: Tensor, weight: Tensor) -> None:
    channels, side = weight.shape[1], weight.shape[-1]
    if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % side or images.shape[3] % side:
        got = list(images.shape)
        raise ValueError(f"{op}: expected images [B, {channels}, H, W], sides multiples of {side}, got {got}")


def _patches(crops: Sequence[Tensor], side: int) -> Tensor:
    """`[patches, channels * side * side]` of all crops."""
    views = [
        crop.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5) for crop in crops
    ]
    ends = [*itertools.accumulate(view.shape[:3].numel() for view in views)]
    patches = crops[0].new_empty(ends[-1], crops[0].shape[1] * side * side)
    for start, end, view in zip([0, *ends], ends, views, strict=False):
        patches[start:end].view(view.shape).copy_(view)
    return patches


def _reference(
    images: Tensor, mask: Tensor | None, resizing: Tensor | None, weights: EmbeddingWeights, width: int
) -> Tensor:
    """`[crops, tokens, width]` of one group."""
    w = weights
    x = embedded_patches(images, w.weight[:width], w.bias[:width])
    if mask is not None:
        assert w.mask_token is not None
        x = torch.where(mask.unsqueeze(-1), w.mask_token[:, :width].to(x.dtype), x)
    first = [w.cls_token] if w.registers is None else [w.cls_token, w.registers]
    rows = [token[..., :width].to(x.dtype).expand(x.shape[0], -1, -1) for token in first]
    return torch.cat([*rows, x], dim=1) + resized_positions(w.positions[..., :width], w.prefix, resizing)


def patch_embedding(op: str, images: Tensor, weight: Tensor, bias: Tensor, width: int) -> Tensor:
    """`[B, channels, H, W]` -> `[B, patches, width]`, with a prefix of the weight and bias."""
    _check_images(op, images, weight)
    if linear_backend(op, images).backend == "triton":
        patches = _patches([images], weight.shape[-1])
        y = elastic_linear(patches, weight.flatten(1), bias, out_features=width, scale=None)
        count = images.shape[2] * images.shape[3] // weight.shape[-1] ** 2
        return y.unflatten(0, (len(images), count))
    return embedded_patches(images, weight[:width], bias[:width])


def embedded_patches(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[B, channels, H, W]` -> `[B, patches, w]`, by PyTorch's convolution."""
    images, weight, bias = dispatch.autocast_operands(images, weight, bias)
    return F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def resized_positions(positions: Tensor, prefix: int, resizing: Tensor | None) -> Tensor:
    """Positions `[1, prefix + patches, w]` with those of patches multiplied by a matrix, if there is one.

    Example:
        >>> import torch
        >>> from elastic_kernels import resized_positions
        >>> resized_positions(torch.ones(1, 5, 2), 1, torch.ones(9, 4)).shape
        torch.Size([1, 10, 2])
    """
    if resizing is None:
        return positions
    with dispatch.without_autocast(positions.device):
        patches = resizing.to(positions) @ positions[:, prefix:]
    return torch.cat([positions[:, :prefix], patches], dim=1)
