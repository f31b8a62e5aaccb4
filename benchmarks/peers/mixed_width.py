"""Other ways to pass rows of several widths through layers: a call a width, masks, `torch._grouped_mm`.

Rows are as wide as the largest network and lie part by part; each part has a width. Scales are POA's offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import naive
from elastic_kernels import ElasticAttention, ElasticBlock, ElasticMLP, LayerScale


class Part(NamedTuple):
    """Rows that lie together: how many sequences and tokens of each, and channels in use."""

    group: tuple[int, int]
    width: int

    @property
    def rows(self) -> int:
        return self.group[0] * self.group[1]


def by_width(parts: Sequence[Part], layer: Callable[[Tensor, Part], Tensor]) -> Callable[[Tensor], Tensor]:
    """Each part through a layer by itself, cut to its width and padded again."""

    def whole(x: Tensor) -> Tensor:
        cut = zip(x.split([part.rows for part in parts]), parts, strict=True)
        outputs = [layer(rows[:, : part.width], part) for rows, part in cut]
        return torch.cat([F.pad(y, (0, x.shape[1] - y.shape[1])) for y in outputs])

    return whole


class Padded:
    """Layers of the largest network on whole rows, with a mask after each of what is beyond a row's width."""

    def __init__(self, parts: Sequence[Part], largest: int, device: torch.device):
        self.parts, self.largest = parts, largest
        self.widths = torch.cat([torch.full((part.rows,), part.width, device=device) for part in parts])

    def within(self, features: int) -> Tensor:
        """Boolean `[rows, features]`: the share of the features that a row's width has of the largest."""
        share = self.widths * features // self.largest
        return torch.arange(features, device=share.device) < share.unsqueeze(1)

    def product(self, x: Tensor, weight: Tensor, stacked: int) -> Tensor:
        """`[rows, k]` -> `[rows, stacked * n]`, of rows that are 0 beyond their widths."""
        return F.linear(x, weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, stacked: int = 1) -> Tensor:
        """`[rows, k]` -> `[rows, stacked, n]`, 0 beyond."""
        factors = (self.largest / self.widths.double()).to(torch.promote_types(x.dtype, torch.float32))
        y = self.product((x * factors.unsqueeze(1)).to(x.dtype), weight, stacked)
        y = (y if bias is None else y + bias).unflatten(1, (stacked, -1))
        return y * self.within(y.shape[2]).unsqueeze(1)

    def layer_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """Statistics over what is within."""
        mask, count = self.within(x.shape[1]), self.widths.unsqueeze(1)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) * mask
        wide = (wide - wide.sum(1, keepdim=True) / count) * mask
        y = wide * (wide.square().sum(1, keepdim=True) / count + norm.eps).rsqrt()
        return (y * norm.weight + norm.bias).to(x.dtype) * mask

    def attention(self, attn: ElasticAttention, x: Tensor) -> Tensor:
        """Absent heads attend, too, to values of 0."""
        h = self.linear(x, attn.qkv.weight, attn.qkv.bias, 3).unflatten(2, (-1, attn.head_dim))
        h = naive.attention(h, [part.group for part in self.parts])
        return self.linear(h, attn.proj.weight, attn.proj.bias).flatten(1)

    def mlp(self, mlp: ElasticMLP, x: Tensor) -> Tensor:
        h = F.gelu(self.linear(x, mlp.fc1.weight, mlp.fc1.bias).flatten(1))
        return self.linear(h, mlp.fc2.weight, mlp.fc2.bias).flatten(1)

    def block(self, block: ElasticBlock, x: Tensor) -> Tensor:
        assert isinstance(block.mlp, ElasticMLP)

        def scaled(scale: LayerScale | None, h: Tensor) -> Tensor:
            return h if scale is None else h * scale.gamma

        x = x * self.within(x.shape[1])
        x = x + scaled(block.ls1, self.attention(block.attn, self.layer_norm(block.norm1, x)))
        return x + scaled(block.ls2, self.mlp(block.mlp, self.layer_norm(block.norm2, x)))


class GroupedMM(Padded):
    """Products by `torch._grouped_mm`: one launch for all parts; corners of weights are padded with zeros."""

    def __init__(self, parts: Sequence[Part], largest: int, device: torch.device):
        super().__init__(parts, largest, device)
        rows = torch.tensor([part.rows for part in parts], device=device)
        self.ends = rows.cumsum(0, dtype=torch.int32)

    def product(self, x: Tensor, weight: Tensor, stacked: int) -> Tensor:
        stack = weight.unflatten(0, (stacked, -1))
        corners = []
        for part in self.parts:
            out, inner = (size * part.width // self.largest for size in stack.shape[1:])
            margin = (0, stack.shape[2] - inner, 0, stack.shape[1] - out)
            corners.append(F.pad(stack[:, :out, :inner], margin).flatten(0, 1))
        return torch._grouped_mm(x, torch.stack(corners).mT, offs=self.ends)
