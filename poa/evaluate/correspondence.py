"""Correspondence: patches of an image are looked for in a crop of it, by the cosine of patch tokens.

The second view is a corner of 3/4 of the side, enlarged to the size of the image and mirrored, so that the
true place of every point is known. A patch of the second view is found right within `alpha` of the side of
the image (PCK, percentage of correct keypoints; Yang and Ramanan, TPAMI 2013).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.evaluate.protocol import Function, Labelled, Protocol
from poa.subnets import Subnet

ALPHAS = (0.05, 0.1, 0.2)  # of the side of the image
REPORTED = 0.1
SHARE = 0.75  # of the side that the second view shows


def second_view(images: Tensor) -> Tensor:
    """The top left corner of `[B, C, S, S]`, enlarged to its size and mirrored left to right."""
    size, side = images.shape[-1], round(SHARE * images.shape[-1])
    corner = images[..., :side, :side]
    return F.interpolate(corner, (size, size), mode="bicubic", align_corners=False).flip(-1)


def patches_of_views(backbone: Backbone, subnet: Subnet) -> Function:
    """Patch tokens `[B, 2, patches, width]` float16 of an image and of its second view."""

    def function(images: Tensor) -> Tensor:
        views = [backbone([view], subnet)[0].patches for view in (images, second_view(images))]
        return torch.stack(views, 1).half()

    return function


def centers(side: int) -> Tensor:
    """Centres `[side * side, 2]`, (x, y) in 0..1, of the patches of an image, row by row."""
    line = (torch.arange(side) + 0.5) / side
    return torch.stack([line.repeat(side), line.repeat_interleave(side)], 1)


def pck(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Share of points within each alpha of their true places; points `[N, 2]` in units of the side."""
    distance = (found.double() - truth.double()).norm(dim=1)
    return {f"{alpha:g}": float((distance <= alpha).double().mean()) for alpha in ALPHAS}


def chance(truth: Tensor, places: Tensor) -> float:
    """PCK at the reported alpha of places `[M, 2]` drawn at random, for true ones `[N, 2]`."""
    return float((torch.cdist(truth.double(), places.double()) <= REPORTED).double().mean())


def correspondence(views: Tensor, device: torch.device) -> dict[str, float]:
    """PCK by alpha of patch tokens `[images, 2, patches, channels]`, and "chance" at the reported one."""
    side = round(views.shape[2] ** 0.5)
    places = centers(side)
    truth = SHARE * torch.stack([1 - places[:, 0], places[:, 1]], 1)
    found = []
    for pair in views:
        image, view = F.normalize(pair.to(device).float(), dim=2)
        found.append(places[(view @ image.t()).argmax(1).cpu()])
    return pck(torch.cat(found), truth.repeat(len(views), 1)) | {"chance": chance(truth, places)}


def _score(train: Labelled, queries: Labelled, device: torch.device, seed: int) -> dict[str, float]:
    return correspondence(queries.features, device)


def columns(score: Mapping[str, float], bound: str = "chance") -> dict[str, float]:
    """Figures of such scores by title; those of earlier versions have no lower bound."""
    known = {f"PCK@{alpha:g}": score[f"{alpha:g}"] for alpha in ALPHAS}
    return known | ({f"PCK {bound}": score[bound]} if bound in score else {})


CORRESPONDENCE = Protocol(
    "correspondence",
    "also look for the patches of an image in a crop of it: PCK",
    patches_of_views,
    _score,
    columns,
    f"PCK@{REPORTED:g}",
    {"protocol": "patches of an enlarged, mirrored corner found in the image by cosine", "corner": SHARE},
    learns=False,
)
