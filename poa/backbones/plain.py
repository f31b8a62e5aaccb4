"""Subnets as ordinary networks: timm's parameter names, and timm's operations in timm's order, so that both
compute the same bits.

Source: timm (github.com/huggingface/pytorch-image-models), `VisionTransformer`, `Eva` and `ResNet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poa.backbones.base import Features
from poa.backbones.positions import angles_of_grid, positions_of_grid

if TYPE_CHECKING:
    from poa.backbones.vit import ViTConfig


class PlainNetwork(nn.Module):
    """A network of one size: crop groups in, the `Features` of each group out, as of a `Backbone`."""

    def forward(self, crops: Sequence[Tensor]) -> list[Features]:
        return [self.features(images) for images in crops]

    def features(self, images: Tensor) -> Features:
        """Those of normalised images `[B, C, H, W]`."""
        raise NotImplementedError


class PlainViT(PlainNetwork):
    """A vision transformer of one size; with a rotary embedding it has the names of timm's `Eva`."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, patch, registers = config.max_width, config.patch_size, config.registers
        self.patch, self.prefix, self.head_dim = patch, config.prefix, config.head_dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(config.channels, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        tokens = self.prefix + config.grid(config.image_size) ** 2
        self.rotary = config.rotary
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width)) if config.learned else None
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.max_depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def features(self, images: Tensor) -> Features:
        x = self.patch_embed["proj"](images)
        height, breadth = x.shape[-2:]
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        rows = [token.expand(images.shape[0], -1, -1) for token in tokens]
        x, angles = torch.cat([*rows, x.flatten(2).transpose(1, 2)], dim=1), None
        if self.rotary:
            angles = angles_of_grid(x, height, breadth, self.head_dim, self.rotary)
        if self.pos_embed is not None:
            x = x + positions_of_grid(self.pos_embed, self.prefix, height, breadth)
        for block in self.blocks:
            x = block(x, angles)
        normed = self.norm(x)
        return Features(normed[:, 0], normed[:, self.prefix :], x)


class _Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        width, eps = config.max_width, config.norm_eps
        mlp = _GatedMlp if config.mlp == "swiglu" else _Mlp
        self.norm1, self.attn = nn.LayerNorm(width, eps=eps), _Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=eps), mlp(width, config.hidden)
        self.layers = config.positions != "rotary"
        if self.layers:
            self.ls1, self.ls2 = _LayerScale(width), _LayerScale(width)
        else:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        first, second = (self.ls1.gamma, self.ls2.gamma) if self.layers else (self.gamma_1, self.gamma_2)
        x = x + self.attn(self.norm1(x), angles) * first
        return x + self.mlp(self.norm2(x)) * second


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _GatedMlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, units = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * units)


class _Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        width = config.max_width
        self.heads, self.prefix = width // config.head_dim, config.prefix
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)

    def projected(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, heads, tokens, head_dim]`."""
        count, length, width = x.shape
        qkv = self.qkv(x).reshape(count, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if angles is not None:
            q, k = (_turned(part, angles, self.prefix) for part in (q, k))
        return q, k, v

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        y = F.scaled_dot_product_attention(*self.projected(x, angles))
        return self.proj(y.transpose(1, 2).reshape(x.shape))


def _turned(x: Tensor, angles: Tensor, prefix: int) -> Tensor:
    """Queries or keys, those of patches turned."""
    sin, cos = angles.unbind(0)
    patches = x[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([x[:, :, :prefix], patches * cos + torch.cat([-second, first], -1) * sin], dim=2)


class _LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


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
