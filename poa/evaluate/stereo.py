"""Correspondence in stereo pairs: patches of the left image are looked for in the right one, scored by PCK.

A folder holds `left/`, `right/` and `disparity/`, whose files have one name; a disparity map has the size of
the left image and says how many pixels further left a point lies in the right one: a NumPy array (`.npy`), or
a PNG of 16 bits in 256ths of a pixel, as KITTI's. 0, NaN and inf are unknown. Images are stretched to
squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import InputError
from poa.evaluate.correspondence import centers, columns, pck
from poa.evaluate.dense import Pair, pictures, read_pair
from poa.evaluate.depth import read_map
from poa.evaluate.protocol import OfFolder, folder_protocol
from poa.options import Options, option
from poa.subnets import Subnet

REPORTED = 0.05  # of the alphas


@dataclass(frozen=True)
class StereoConfig(Options, at="stereo"):
    """How stereo pairs are seen."""

    size: int = option(0, "pixels of a side of the squares; 0: that of evaluations", "[0, 4096]")


class StereoPairs(NamedTuple):
    """Stereo pairs in memory.

    Attributes:
        images: of each pair, normalised float32 `[2, C, S, S]`, left and right.
        disparities: float32 `[S, S]` in units of the width, 0 where unknown.
    """

    images: list[Tensor]
    disparities: list[Tensor]

    def counts(self) -> dict[str, int]:
        return {"pairs": len(self.images)}


def open_stereo(folder: Path, crops: CropsConfig, options: StereoConfig, left_out: LeftOut) -> StereoPairs:
    """The pairs of a folder; those that cannot be used are counted. Raises InputError: there are none."""
    side, opened = options.size or crops.global_size, StereoPairs([], [])
    std, mean = (torch.tensor(values)[:, None, None] for values in (crops.std, crops.mean))
    for left in pictures(folder / "left"):
        target = partial(read_map, folder / "disparity" / left.stem, 256)
        views = []
        for file in (left, folder / "right" / left.name):
            if (view := read_pair(Pair(file, target), len(crops.mean), left_out)) is None:
                break
            views.append(view)
        if len(views) < 2:
            continue
        pixels = [
            F.interpolate(x[None].float() / 255, (side, side), mode="bicubic", antialias=True)[0].clamp(0, 1)
            for x, _ in views
        ]
        disparity = views[0][1] / views[0][1].shape[1]
        opened.images.append((torch.stack(pixels) - mean) / std)
        opened.disparities.append(F.interpolate(disparity[None, None], (side, side), mode="nearest")[0, 0])
    if not opened.images:
        expected = f"pairs of images in {folder / 'left'} and {folder / 'right'} with disparity maps"
        raise InputError(f"--stereo: expected {expected}, got none ({left_out or 'no images there'})")
    return opened


@torch.no_grad()
def _check(backbone: Backbone, subnet: Subnet, opened: StereoPairs) -> None:
    weights = next(backbone.parameters(), opened.images[0])  # features without a network have none
    try:
        backbone([opened.images[0][:1].to(weights.device)], subnet)
    except InputError as error:
        raise InputError(f"stereo.size: {error}") from None


@torch.no_grad()
def stereo(
    backbone: Backbone, subnet: Subnet, opened: StereoPairs, device: torch.device, seed: int
) -> dict[str, float]:
    """PCK by alpha of the patches of all pairs whose right place is known and in the image.

    As disparities are small, "same place" is that of patches left where they are, at the reported alpha."""
    found, same, truth = list[Tensor](), list[Tensor](), list[Tensor]()
    for images, disparity in zip(opened.images, opened.disparities, strict=True):
        left, right = F.normalize(backbone([images.to(device)], subnet)[0].patches.float(), dim=2).cpu()
        places = centers(round(len(left) ** 0.5))
        columns_of, rows_of = (places * disparity.shape[0]).long().unbind(1)
        moved = disparity[rows_of, columns_of]
        there = places - torch.stack([moved, torch.zeros_like(moved)], 1)
        known = (moved > 0) & (there[:, 0] >= 0)
        found.append(places[(left[known] @ right.t()).argmax(1)])
        same.append(places[known])
        truth.append(there[known])
    if not len(known_places := torch.cat(truth)):
        raise InputError("--stereo: expected patches with a known disparity at their centres, got none")
    unmoved = pck(torch.cat(same), known_places)[f"{REPORTED:g}"]
    return pck(torch.cat(found), known_places) | {"same place": unmoved}


STEREO = folder_protocol(
    "stereo",
    "also look for patches of left images of this folder in the right ones, whose disparity is known: PCK",
    OfFolder(StereoConfig(), open_stereo, stereo, _check),
    lambda score: {f"stereo {title}": value for title, value in columns(score, "same place").items()},
    f"stereo PCK@{REPORTED:g}",
    {"protocol": "patches of left images found in right ones by cosine, PCK in shares of the side"},
)
