"""What networks of several stages share: maps that halve from stage to stage, and masks on a coarse grid."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from poa.backbones.base import Backbone, BackboneConfig, Features, Inputs
from poa.errors import InputError
from poa.options import option
from poa.subnets import SearchSpace, Subnet, active_blocks, stage_depths

C = TypeVar("C", bound="PyramidConfig")

MOST_STAGES = 8


@dataclass(frozen=True)
class PyramidConfig(BackboneConfig):
    """Options of networks of several stages."""

    image_size: int = option(224, "pixels of a side of the global crops", "[1, 4096]")
    channels: int = option(3, "channels of the images", "[1, 16]")
    min_depths: tuple[int, ...] = option((2, 2, 6, 2), "blocks per stage of the smallest subnet", "[1, 1024]")
    max_depths: tuple[int, ...] = option((2, 2, 18, 2), "blocks per stage of the intact network", "[1, 1024]")
    min_width: int = option(96, "channels of the first stage of the narrowest subnet", "[1, 4096]")
    max_width: int = option(128, "channels of the first stage of the intact network", "[1, 4096]")
    width_step: int | None = option(None, "distance between widths; none: the smallest", "[1, 4096]")
    mask_scale: int = option(2, "mask patches per position of the last map, per side: 1, 2 or 4", "[1, 4]")
    sampling_scale: float = option(
        2.0, "how much more often the smallest width, or depth, is drawn than the largest", "[1, 100]"
    )
    masked: bool = option(True, "has a mask token; false for exported models")

    def check(self) -> None:
        if not 2 <= len(self.max_depths) <= MOST_STAGES:
            raise self.wrong("max_depths", f"2 to {MOST_STAGES} stages")
        if len(self.min_depths) != len(self.max_depths):
            raise self.wrong("min_depths", f"as many stages as max_depths {self.max_depths}")
        if any(low > high for low, high in zip(self.min_depths, self.max_depths, strict=True)):
            raise self.wrong("min_depths", f"at most max_depths {self.max_depths}")
        if self.mask_scale == 3:
            raise self.wrong("mask_scale", "1, 2 or 4")
        ranges = zip(self.min_depths, self.max_depths, strict=True)
        self.require_widths(math.prod(1 + high - low for low, high in ranges))
        self.grid(self.image_size)

    @property
    def stride(self) -> int:
        """As `BackboneConfig.stride`: pixels from one position of the last map to the next."""
        return self.first_stride * 2 ** (len(self.max_depths) - 1)

    @property
    @abstractmethod
    def first_stride(self) -> int:
        """Pixels from one position of the first stage's map to the next."""

    @property
    def space(self) -> SearchSpace:
        depths = stage_depths(self.min_depths, self.max_depths)
        return SearchSpace(self.widths, depths, self.sampling_scale, self.sampling_scale)

    def active(self, subnet: Subnet, stage: int) -> list[int]:
        """Indices of the active blocks of a stage."""
        return active_blocks(self.max_depths[stage], subnet.blocks[stage])

    def _half_depth(self) -> dict[str, Any]:
        return {"min_depths": tuple(-(-depth // 2) for depth in self.max_depths)}

    def of_one_size(self: C, subnet: Subnet, image_size: int | None = None) -> C:
        """The configuration of a subnet as a network of its own."""
        return dataclasses.replace(
            self,
            image_size=image_size or self.image_size,
            min_width=subnet.width,
            max_width=subnet.width,
            min_depths=subnet.blocks,
            max_depths=subnet.blocks,
            masked=False,
        )

    def grid(self, image_size: int) -> int:
        if image_size < self.stride or image_size % self.stride:
            raise InputError(f"image size: expected a multiple of the stride {self.stride}, got {image_size}")
        return image_size // self.stride * self.mask_scale

    def sides(self, image_size: int | None = None) -> list[int]:
        """Sides of the maps of the stages, of a square image."""
        side = -(-(image_size or self.image_size) // self.first_stride)
        sides = [side]
        for _ in self.max_depths[1:]:
            side = -(-side // 2)
            sides.append(side)
        return sides


class Pyramid(Backbone):
    """A backbone of several stages; the mean of its last map stands for the image."""

    config: PyramidConfig
    mask_token: nn.Parameter | None

    @abstractmethod
    def maps(self, inputs: Inputs) -> list[Tensor]:
        """The last map `[crops, height, width, channels]` of each group."""

    def normalise(self, x: Tensor) -> Tensor:
        """The last norm, where there is one."""
        return x

    def _features(self, inputs: Inputs) -> list[Features]:
        return [self._features_of(x) for x in self.maps(inputs)]

    def _tokens(self, inputs: Inputs, patches: Tensor) -> Tensor:
        maps = [self.normalise(x) for x in self.maps(inputs)]
        last = maps[-1]
        height, width = last.shape[1:3]
        scale = self.config.mask_scale
        image, position = patches // (height * width * scale**2), patches % (height * width * scale**2)
        row, column = position // (width * scale) // scale, position % (width * scale) // scale
        chosen = last.flatten(0, 2).index_select(0, (image * height + row) * width + column)
        return torch.cat([*(_mean(x) for x in maps), chosen])

    def _under_mask(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps `[crops, height, width, channels]` with the mask token where a mask is True.

        The mask is bool `[crops, rows * columns]`, of a grid as wide for its height as the maps. Raises
        InputError: the maps are no multiple of the grid.
        """
        if mask is None:
            return x
        if self.mask_token is None:
            raise ValueError("mask: expected None for a network without a mask token, got a mask")
        height, width = x.shape[1:3]
        times = round((height * width / mask.shape[1]) ** 0.5)
        if height % times or width % times or height * width != mask.shape[1] * times**2:
            raise InputError(
                f"mask: expected a grid that divides the {height}x{width} map, got {mask.shape[1]} patches"
            )
        grid = mask.view(-1, height // times, width // times)
        fine = grid.repeat_interleave(times, 1).repeat_interleave(times, 2).unsqueeze(-1)
        return torch.where(fine, self.mask_token[0, : x.shape[-1]].to(x.dtype), x)

    def _features_of(self, x: Tensor) -> Features:
        normed, scale = self.normalise(x), self.config.mask_scale
        patches = normed.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return Features(_mean(normed), patches.flatten(1, 2), x.flatten(1, 2))


def _mean(x: Tensor) -> Tensor:
    """`[crops, height, width, channels]` -> `[crops, channels]`, at least float32."""
    return x.mean((1, 2), dtype=torch.promote_types(x.dtype, torch.float32))
