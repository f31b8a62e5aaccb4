"""Windows of large maps, in which most blocks of a ViT attend for detection; a few see the whole map.

Windows are as even as they can be, so none is padded. Each is a sequence of its own: with copies of the class
token and the registers before its patches, as an image of its size has them, of which the whole map has the
mean. Source: ViTDet (Li et al., ECCV 2022), whose network has no class token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from elastic_kernels import ElasticBlock, Rotary
from poa.multicrop import Groups

WHOLE = 4  # blocks that see the whole map, evenly spaced, the last one among them


def whole_blocks(depth: int) -> set[int]:
    """Which of so many blocks see the whole map."""
    return {round((i + 1) * depth / WHOLE) - 1 for i in range(WHOLE)} - {-1}


@dataclass(frozen=True)
class MapWindows:
    """Which tokens of images are where when they are packed by windows.

    Attributes:
        images, prefix: how many there are; tokens of one before its patches.
        groups: `(windows, tokens of each)` of each length.
        order: int64 `[packed tokens]`, positions in the packed images; those of a prefix once a window.
        places: int64 `[packed tokens]`, its inverse: of each prefix all copies, of each patch its place.
    """

    images: int
    prefix: int
    groups: Groups
    order: Tensor
    places: Tensor

    @classmethod
    def of(
        cls, images: int, grid: tuple[int, int], prefix: int, size: int, device: torch.device
    ) -> MapWindows:
        """Of maps of `grid` patches, windows of at most `size` patches along each side."""
        tokens = torch.arange(images * (prefix + math.prod(grid))).view(images, -1)
        first, maps = tokens[:, :prefix], tokens[:, prefix:].unflatten(1, grid)
        down, across = (-(-side // size) for side in grid)
        windows = [
            torch.cat([first, window.flatten(1)], 1)
            for rows in maps.tensor_split(down, 1)
            for window in rows.tensor_split(across, 2)
        ]
        windows.sort(key=lambda window: window.shape[1])
        lengths = [window.shape[1] for window in windows for _ in range(images)]
        groups = tuple((len(list(same)), length) for length, same in groupby(lengths))
        order = torch.cat([window.flatten() for window in windows])
        places = order.argsort(stable=True)
        return cls(images, prefix, groups, order.to(device), places.to(device))

    def split(self, x: Tensor) -> Tensor:
        """Tokens of images `[tokens, width]` by windows."""
        return x.index_select(0, self.order)

    def join(self, x: Tensor) -> Tensor:
        """Tokens by windows as those of images."""
        windows = sum(count for count, _ in self.groups) // self.images
        places = self.places.view(self.images, -1)
        copies, patches = places.split([self.prefix * windows, places.shape[1] - self.prefix * windows], 1)
        first = x[copies.view(self.images, self.prefix, windows)].mean(2)
        return torch.cat([first, x[patches]], 1).flatten(0, 1)

    def run(
        self, blocks: Sequence[ElasticBlock], x: Tensor, groups: Groups, rotary: Rotary | None = None
    ) -> Tensor:
        """Blocks on the packed tokens of images, whose groups and angles are these."""
        whole, turned = whole_blocks(len(blocks)), rotary and rotary.rows(self.order)
        apart = False
        for number, block in enumerate(blocks):
            if number in whole:
                x = block(self.join(x) if apart else x, groups, None, inplace=True, rotary=rotary)
            else:
                x = block(x if apart else self.split(x), self.groups, None, inplace=True, rotary=turned)
            apart = number not in whole
        return x
