"""Maps of a subnet at several strides, for detectors: from the stages that it has, or from its last map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poa.backbones import Backbone
from poa.errors import InputError, optional_package
from poa.subnets import Subnet


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al., ECCV 2022): one map at 1/4, 1/2, 1 and 2 times its
    stride, each then of `channels` channels.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        half, quarter = max(width // 2, 1), max(width // 4, 1)

        def up(entry: int, out: int) -> nn.Module:
            return nn.ConvTranspose2d(entry, out, 2, stride=2)

        self.scales = nn.ModuleList(
            (
                nn.Sequential(up(width, half), ChannelNorm(half), nn.GELU(), up(half, quarter)),
                up(width, half),
                nn.Identity(),
                nn.MaxPool2d(2),
            )
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(entry, channels, 1, bias=False),
                ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ChannelNorm(channels),
            )
            for entry in (quarter, half, width, width)
        )

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """`[B, width, H, W]`, the only map, to the four by number, and a coarser one."""
        pairs = zip(self.scales, self.outputs, strict=True)
        levels = {str(i): output(scale(maps[0])) for i, (scale, output) in enumerate(pairs)}
        return levels | {"pool": F.max_pool2d(levels["3"], 1, 2)}


class StagePyramid(nn.Module):
    """torchvision's feature pyramid network on the maps of all stages, each normalised."""

    def __init__(self, widths: Sequence[int], channels: int):
        super().__init__()
        ops = optional_package("torchvision.ops", "detection")
        coarser = optional_package("torchvision.ops.feature_pyramid_network", "detection").LastLevelMaxPool()
        self.norms = nn.ModuleList(ChannelNorm(width) for width in widths)
        self.network = ops.FeaturePyramidNetwork(list(widths), channels, extra_blocks=coarser)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps `[B, widths[i], H_i, W_i]` to as many by number, and a coarser one."""
        named = {str(i): norm(x) for i, (norm, x) in enumerate(zip(self.norms, maps, strict=True))}
        levels: dict[str, Tensor] = self.network(named)
        return levels


class SubnetPyramid(nn.Module):
    """A subnet and its pyramid, a backbone of torchvision's detectors.

    Args:
        backbone: the weights of all subnets.
        subnet: which of them; its strides become powers of two, by resampling images where patches have
            another size.
        channels: of all levels.
        frozen: the subnet is used as it is; otherwise a copy of it is trained, `trained`.
        window: as of `Backbone.stage_maps`.

    Attributes:
        strides: pixels from one position to the next, of each level.
        divisor: of which sides of images are multiples.
    """

    def __init__(self, backbone: Backbone, subnet: Subnet, channels: int, frozen: bool, window: int = 0):
        super().__init__()
        self.out_channels, self.window = channels, window
        device = next(backbone.parameters()).device
        self.trained = None if frozen else backbone.to_static(subnet).to(device)
        self._of = (self.trained or backbone, self.trained.space.intact if self.trained else subnet)
        side: int = backbone.config.image_size
        blank = torch.zeros(1, backbone.config.channels, side, side, device=device)
        with torch.no_grad():
            maps = self._of[0].stage_maps(blank, self._of[1])
        widths, first = [x.shape[3] for x in maps], side / maps[0].shape[1]
        finest = 2 ** round(math.log2(first))
        self.factor = first / finest
        self.neck: nn.Module
        if len(maps) == 1:
            self.neck = SimplePyramid(widths[0], channels)
            self.strides, self.divisor = [finest * 2**i / 4 for i in range(5)], 2 * finest
        else:
            self.neck = StagePyramid(widths, channels)
            self.strides = [finest * 2**i for i in range(len(maps) + 1)]
            self.divisor = int(self.strides[-2])

    def require_size(self, size: int) -> None:
        """Raise InputError where images of `size` pixels do not fit."""
        if size % self.divisor:
            raise InputError(f"detection.size: expected a multiple of {self.divisor}, got {size}")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images `[B, C, S, S]` to maps `[B, channels, S / stride, S / stride]`."""
        if self.factor != 1:
            size = [round(side * self.factor) for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        backbone, subnet = self._of
        with torch.set_grad_enabled(self.trained is not None and torch.is_grad_enabled()):
            maps = backbone.stage_maps(images, subnet, self.window)
        levels: dict[str, Tensor] = self.neck([x.permute(0, 3, 1, 2).float() for x in maps])
        return levels


def anchor_sizes(strides: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Sides of anchors in pixels on each level: eight strides, which is torchvision's 32 to 512 from 4 on."""
    return tuple((max(round(8 * stride), 1),) for stride in strides)


def layer_rates(pyramid: SubnetPyramid, rate: float, decay: float) -> list[dict[str, Any]]:
    """Groups of the parameters of a trained subnet for an optimiser, with layer-wise learning-rate decay."""
    if pyramid.trained is None:
        return []
    rates: dict[float, list[Tensor]] = {}
    for name, parameter in pyramid.trained.named_parameters():
        rates.setdefault(rate * decay ** (1 + pyramid.trained.layers_above(name)), []).append(parameter)
    return [{"params": group, "lr": value} for value, group in rates.items()]
