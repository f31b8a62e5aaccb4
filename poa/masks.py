"""Block-wise masks of patches for the iBOT loss.

Half of the images get a mask made of random rectangles, with mask ratios spread evenly over a range. The
order of random draws is the official one, so a seed gives the official masks.

Source: BEiT (Bao et al., 2022); official `MaskingGenerator` and `collate_data_and_cast`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastic_kernels import upload
from poa.options import Options, option

MIN_PATCHES = 4  # of the rectangle a mask is built from
LOG_ASPECTS = math.log(0.3), math.log(1 / 0.3)  # between which that of a rectangle is drawn
TRIES = 10  # rectangles tried before a mask is left as it is


@dataclass(frozen=True)
class MaskConfig(Options, at="method.masks"):
    """Masks of the masked-patch (iBOT) loss."""

    probability: float = option(0.5, "share of the global crops that get a mask", "[0, 1]")
    ratio: tuple[float, float] = option((0.1, 0.5), "range of the masked share of a masked crop", "[0, 1]")

    def check(self) -> None:
        if self.ratio[0] > self.ratio[1]:
            raise self.wrong("ratio", "the smaller value first")


@dataclass(frozen=True)
class Masks:
    """Masks of the global crops of a micro-batch.

    Attributes:
        mask: bool `[crops, patches]`, True where the students see the mask token.
        indices: int64 `[masked]`, positions in the flattened mask.
        weights: float32 `[masked]`, one over the masked patches of the same image.
    """

    mask: Tensor
    indices: Tensor
    weights: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> Masks:
        """Indices and weights of a CPU bool tensor `[crops, patches]`."""
        share = 1 / mask.sum(-1).clamp(min=1.0)
        weights = share.unsqueeze(-1).expand_as(mask)[mask]
        return cls(mask, mask.flatten().nonzero().flatten(), weights)

    @classmethod
    def none(cls, crops: int, patches: int) -> Masks:
        """Nothing masked."""
        return cls.from_mask(torch.zeros(crops, patches, dtype=torch.bool))

    def to(self, device: torch.device) -> Masks:
        return Masks(*(upload(t, device) for t in (self.mask, self.indices, self.weights)))


def draw_masks(
    crops: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
    generator: random.Random,
) -> Masks:
    """Draw the masks of a micro-batch's global crops, both views together, on a grid of patches (high, wide).

    A share `probability` of the crops gets one; these divide the range of ratios of masked patches evenly.
    """
    patches = grid[0] * grid[1]
    masked = int(crops * probability)
    # Official code computes these counts in float32; float64 would give other integers now and then.
    edges = torch.linspace(*ratio, masked + 1).numpy()
    masks = []
    for low, high in zip(edges, edges[1:], strict=False):
        share = np.float32(low) + np.float32(high - low) * np.float32(generator.random())
        masks.append(draw_block_mask(grid, int(np.float32(patches) * share), generator))
    masks += [np.zeros(grid, dtype=bool)] * (crops - masked)
    generator.shuffle(masks)
    return Masks.from_mask(torch.from_numpy(np.stack(masks)).flatten(1))


def draw_block_mask(grid: tuple[int, int], target: int, generator: random.Random) -> np.ndarray:
    """A bool mask of about `target` patches as a union of rectangles; it may stop short of the target."""
    mask = np.zeros(grid, dtype=bool)
    largest = 0.5 * grid[0] * grid[1]
    count = 0
    while count < target:
        added = _add_rectangle(mask, min(target - count, largest), generator)
        if not added:
            break
        count += added
    return mask


def _add_rectangle(mask: np.ndarray, room: float, generator: random.Random) -> int:
    """Mask one more rectangle with at most `room` new patches; return how many are new."""
    height, width = mask.shape
    for _ in range(TRIES):
        area = generator.uniform(MIN_PATCHES, room)
        aspect = math.exp(generator.uniform(*LOG_ASPECTS))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w >= width or h >= height:
            continue
        top, left = generator.randint(0, height - h), generator.randint(0, width - w)
        window = mask[top : top + h, left : left + w]
        new = h * w - int(np.count_nonzero(window))
        if 0 < new <= room:
            window[:] = True
            return new
    return 0
