"""Subnets as ordinary networks: timm's parameter names, and timm's operations in timm's order, so that both
compute the same bits.

Source: timm (github.com/huggingface/pytorch-image-models), `VisionTransformer` and `ResNet`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poa.backbones.base import Features
from poa.backbones.positions import positions_of_grid


class PlainNetwork(nn.Module):
    """A network of one size: crop groups in, the `Features` of each group out, as of a `Backbone`."""

    def forward(self, crops: Sequence[Tensor]) -> list[Features]:
        return [self.features(images) for images in crops]

    def features(self, images: Tensor) -> Features:
        """Those of normalised images `[B, C, H, W]`."""
        raise NotImplementedError


class PlainViT(PlainNetwork):
    """A vision transformer.

    Images of the trained size have `grid` patches of `patch` pixels along a side; `registers` are tokens
    between the class token and the patches, `hidden` units those of an MLP.
    """

    def __init__(
        self,
        grid: int,
        channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        registers: int,
        eps: float,
    ):
        super().__init__()
        self.patch, self.prefix = patch, 1 + registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + grid**2, width))
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)

    def features(self, images: Tensor) -> Features:
        x = self.patch_embed["proj"](images)
        height, breadth = x.shape[-2:]
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        rows = [token.expand(images.shape[0], -1, -1) for token in tokens]
        x = torch.cat([*rows, x.flatten(2).transpose(1, 2)], dim=1)
        x = x + positions_of_grid(self.pos_embed, self.prefix, height, breadth)
        for block in self.blocks:
            x = block(x)
        normed = self.norm(x)
        return Features(normed[:, 0], normed[:, self.prefix :], x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _Attention(width, heads)
        self.ls1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.ls2 = _LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(x).reshape(count, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(count, length, width))


class _LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class PlainResNet(PlainNetwork):
    """A ResNet of bottlenecks with group norm.

    `base` are the channels of the stem, `expansion` times as many those of the first stage's outputs,
    `middle` the narrowest of its blocks: they double from stage to stage. `scale` is patches per position of
    the last map, along each side.
    """

    def __init__(
        self,
        channels: int,
        base: int,
        middle: int,
        depths: Sequence[int],
        groups: int,
        expansion: int,
        scale: int,
    ):
        super().__init__()
        self.scale, self.stages = scale, len(depths)
        self.conv1 = nn.Conv2d(channels, base, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.GroupNorm(groups, base)
        entry = base
        for stage, depth in enumerate(depths):
            out, blocks = expansion * base * 2**stage, list[nn.Module]()
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(_Bottleneck(entry, middle * 2**stage, out, groups, stride, not index))
                entry = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def features(self, images: Tensor) -> Features:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        maps = x.permute(0, 2, 3, 1)
        patches = maps.repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2)
        return Features(F.adaptive_avg_pool2d(x, 1).flatten(1), patches.flatten(1, 2), maps.flatten(1, 2))


class _Bottleneck(nn.Module):
    def __init__(self, entry: int, middle: int, out: int, groups: int, stride: int, shortcut: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(entry, middle, 1, bias=False), nn.GroupNorm(groups, middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.GroupNorm(groups, middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, out, 1, bias=False), nn.GroupNorm(groups, out)
        layers = nn.Conv2d(entry, out, 1, stride=stride, bias=False), nn.GroupNorm(groups, out)
        self.downsample = nn.Sequential(*layers) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))
