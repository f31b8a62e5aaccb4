"""Lower bounds: features without a network, scored as those of subnets are.

pixels      the image, shrunk to 32 x 32 pixels at most; of a patch its pixels
histogram   shares of the values of each channel in 16 bins, of the image and of each patch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poa.backbones.base import BackboneConfig, Features
from poa.data.crops import CropsConfig

LARGEST = 32  # pixels of a side of an image whose pixels are its features
BINS = 16

Describe = Callable[[Tensor], Tensor]
"""From values `[B, C, H, W]` in 0..1 to features `[B, F]`."""


def raw_pixels(x: Tensor) -> Tensor:
    """Pixels, shrunk where they are many."""
    size = [min(side, LARGEST) for side in x.shape[-2:]]
    return (x if size == [*x.shape[-2:]] else F.interpolate(x, size, mode="area")).flatten(1)


def histogram(x: Tensor) -> Tensor:
    """Share of each bin, of each channel."""
    bins = F.one_hot((x.flatten(2) * BINS).long().clamp(0, BINS - 1), BINS)
    return bins.float().mean(2).flatten(1)


DESCRIBE: Mapping[str, Describe] = {"pixels": raw_pixels, "histogram": histogram}


class Baseline(nn.Module):
    """Such features, asked for as those of a backbone are; of its patches those of the image's own size.

    Args:
        name: of `DESCRIBE`.
        config: tells the grid of patches.
        crops: tells mean and standard deviation of pixels.
    """

    def __init__(self, name: str, config: BackboneConfig, crops: CropsConfig):
        super().__init__()
        self.describe, self.config, self.crops = DESCRIBE[name], config, crops

    def forward(self, crops: Sequence[Tensor], subnet: object = None) -> list[Features]:
        return [self._features(images) for images in crops]

    def last_blocks(self, images: Tensor, subnet: object, count: int) -> list[Features]:
        """As one token: that of the image."""
        (features,) = self([images])
        return [Features(features.cls, features.cls[:, None], features.cls[:, None])]

    def _features(self, images: Tensor) -> Features:
        std, mean = (torch.tensor(v).to(images)[:, None, None] for v in (self.crops.std, self.crops.mean))
        x = images * std + mean
        grid, channels = self.config.grid(x.shape[-1]), x.shape[1]
        side = x.shape[-1] // grid
        tiles = F.unfold(x[..., : side * grid, : side * grid], side, stride=side).transpose(1, 2)
        described = self.describe(tiles.reshape(-1, channels, side, side))
        patches = described.view(len(x), grid * grid, -1)
        return Features(self.describe(x), patches, patches)
