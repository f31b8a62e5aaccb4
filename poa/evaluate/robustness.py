"""Robustness: k-NN of damaged held-out images among whole training images, over the strength of the damage.

    drop       a share of the patches is black (the mean of the pixels); Naseer et al., NeurIPS 2021
    salient    so the patches that are most like the class token by cosine, as the subnet sees the whole image
               (like their mean, where a timm model pools into features of another width)
    background so those that are least like it
    shuffle    the tiles of a grid change places; as there
    others     common corruptions at five levels, on tensors, in the spirit of Hendrycks and Dietterich, ICLR
               2019, whose strengths are for 224 pixels: widths of blurs scale with the size of images

What is drawn depends on the pixels of an image alone, so it is the same for every subnet, batch and rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.data.crops import CropsConfig
from poa.evaluate.knn import REPORTED_K, class_token, knn_accuracy
from poa.evaluate.protocol import Function, Labelled, Protocol
from poa.random import torch_stream
from poa.subnets import Subnet

DROPS = [0.1, 0.3, 0.5, 0.7, 0.9]  # shares of patches
GRIDS = [2, 4, 8, 16]  # tiles along a side, of which those are used that divide the patches
LEVELS = 5
PATTERNS, NOISES = 256, 8  # that images choose from
REFERENCE = 224  # pixels of a side that widths of blurs are for

Damage = Callable[[Tensor, int], Tensor]
"""From pixels `[B, C, S, S]` in 0..1 and a level from 0 to such pixels."""


def _chosen(images: Tensor, patterns: Tensor) -> Tensor:
    """For each image one of some patterns `[P, ...]`, by its pixels."""
    sums = (1e3 * images.double().sum((1, 2, 3))).long()
    return patterns.to(images.device)[sums % len(patterns)]


def drop_patches(images: Tensor, share: float, patches: int) -> Tensor:
    """Set a share of the `patches x patches` tiles of normalised images to 0."""
    count, draw = patches**2, torch_stream(0, "dropped patches", round(100 * share))
    order = torch.rand(PATTERNS, count, generator=draw).argsort(1)
    kept = _chosen(images, order >= round(share * count)).view(-1, 1, patches, patches).to(images)
    return images * F.interpolate(kept, images.shape[-2:], mode="nearest")


def drop_ranked(images: Tensor, share: float, ranks: Tensor) -> Tensor:
    """Set the patches of the lowest ranks `[B, patches]`, this share of them, to 0."""
    count = ranks.shape[1]
    side = math.isqrt(count)
    kept = (ranks >= round(share * count)).view(-1, 1, side, side).to(images)
    return images * F.interpolate(kept, images.shape[-2:], mode="nearest")


def shuffle_tiles(images: Tensor, grid: int) -> Tensor:
    """Move the tiles of a `grid x grid` to random places."""
    side, draw = images.shape[-1] // grid, torch_stream(0, "shuffled tiles", grid)
    tiles = F.unfold(images, side, stride=side)
    order = _chosen(images, torch.rand(PATTERNS, 1, grid**2, generator=draw).argsort(2))
    return F.fold(tiles.gather(2, order.expand_as(tiles)), images.shape[-2:], side, stride=side)


def _noise(x: Tensor, name: str, level: int, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    return _chosen(x, draw(NOISES, *x.shape[1:], generator=torch_stream(0, name, level)))


def gaussian_noise(x: Tensor, level: int) -> Tensor:
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[level] * _noise(x, "gaussian", level)


def shot_noise(x: Tensor, level: int) -> Tensor:
    """The normal approximation of a Poisson distribution."""
    return x + (x / (60, 25, 12, 5, 3)[level]).sqrt() * _noise(x, "shot", level)


def impulse_noise(x: Tensor, level: int) -> Tensor:
    amount, draw = (0.03, 0.06, 0.09, 0.17, 0.27)[level], _noise(x, "impulse", level, torch.rand)
    x = torch.where(draw < amount / 2, torch.zeros_like(x), x)
    return torch.where(draw > 1 - amount / 2, torch.ones_like(x), x)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    height, width = kernel.shape
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    return F.conv2d(padded, kernel.to(x).expand(x.shape[1], 1, -1, -1).contiguous(), groups=x.shape[1])


def gaussian_blur(x: Tensor, level: int) -> Tensor:
    sigma = (2, 3, 4, 6, 8)[level] * x.shape[-1] / REFERENCE
    radius = max(math.ceil(3 * sigma), 1)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    line = line / line.sum()
    return _filtered(_filtered(x, line[None]), line[:, None])


def motion_blur(x: Tensor, level: int) -> Tensor:
    """Along rows."""
    radius = max(round((10, 15, 20, 25, 30)[level] * x.shape[-1] / REFERENCE / 2), level // 2 + 1)
    return _filtered(x, torch.full((1, 2 * radius + 1), 1 / (2 * radius + 1)))


def brightness(x: Tensor, level: int) -> Tensor:
    return x + (0.1, 0.2, 0.3, 0.4, 0.5)[level]


def contrast(x: Tensor, level: int) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[level] * (x - mean)


def saturation(x: Tensor, level: int) -> Tensor:
    grey = x.mean(1, keepdim=True)
    return grey + (0.5, 0.2, 2.0, 4.0, 8.0)[level] * (x - grey)


def pixelate(x: Tensor, level: int) -> Tensor:
    side = max(round((0.6, 0.5, 0.4, 0.3, 0.25)[level] * x.shape[-1]), 1)
    return F.interpolate(F.interpolate(x, (side, side), mode="area"), x.shape[-2:], mode="nearest")


RANKED = [(kind, f"{share:g}") for kind in ("salient", "background") for share in DROPS]

CORRUPTIONS: Mapping[str, Damage] = {
    f.__name__: f
    for f in (
        gaussian_noise, shot_noise, impulse_noise, gaussian_blur, motion_blur, brightness, contrast,
        saturation, pixelate,
    )
}  # fmt: skip
"""By name; results are clipped to 0..1."""


def conditions(patches: int, crops: CropsConfig) -> list[tuple[str, str, Function]]:
    """Kind, strength and function of normalised images, of every damage; for so many patches along a side."""
    std, mean = (torch.tensor(values)[:, None, None] for values in (crops.std, crops.mean))

    def corrupted(images: Tensor, damage: Damage, level: int) -> Tensor:
        scale, shift = std.to(images), mean.to(images)
        whole = (images * scale + shift).clamp(0, 1)  # rounding leaves it a little outside
        return (damage(whole, level).clamp(0, 1) - shift) / scale

    grids = [grid for grid in GRIDS if patches % grid == 0]
    functions: list[Function] = [lambda images: images]
    functions += [partial(drop_patches, share=share, patches=patches) for share in DROPS]
    functions += [partial(shuffle_tiles, grid=grid) for grid in grids]
    for damage in CORRUPTIONS.values():
        functions += [partial(corrupted, damage=damage, level=level) for level in range(LEVELS)]
    named = zip(_names(len(grids)), functions, strict=True)
    return [(kind, strength, function) for (kind, strength), function in named]


def _names(grids: int) -> list[tuple[str, str]]:
    """Kind and strength of the conditions, with the first so many grids: each divides the next."""
    return [
        ("clean", "0"),
        *(("drop", f"{share:g}") for share in DROPS),
        *(("shuffle", str(grid)) for grid in GRIDS[:grids]),
        *((name, str(level + 1)) for name in CORRUPTIONS for level in range(LEVELS)),
    ]


def damaged_tokens(backbone: Backbone, subnet: Subnet, crops: CropsConfig) -> Function:
    """Class tokens `[B, conditions, width]`."""
    every = conditions(backbone.config.grid(crops.global_size), crops)

    def function(images: Tensor) -> Tensor:
        (features,) = backbone([images], subnet)
        patches, token = features.patches.float(), features.cls.float()
        token = token if token.shape[1] == patches.shape[2] else patches.mean(1)
        likeness = F.cosine_similarity(patches, token[:, None], dim=2)
        places = likeness.argsort(1).argsort(1)  # 0: the least like the class token
        ranks = {"salient": places.shape[1] - 1 - places, "background": places}
        damaged = [damage(images) for _, _, damage in every]
        damaged += [drop_ranked(images, share, ranks[kind]) for kind in ranks for share in DROPS]
        return torch.stack([backbone([x], subnet)[0].cls.float() for x in damaged], 1)

    return function


def robustness(
    train: Labelled, queries: Labelled, device: torch.device, names: Sequence[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """20-NN accuracy by kind of damage and its strength, which `names` tells of each condition, by class
    tokens `[N, C]` of whole training images and `[M, conditions, C]` of damaged queries."""
    curves: dict[str, dict[str, float]] = {}
    for number, (kind, strength) in enumerate(names):
        asked = queries.features[:, number]
        accuracy = knn_accuracy(*train, asked, queries.labels, (REPORTED_K,), device=device)
        curves.setdefault(kind, {})[strength] = accuracy[REPORTED_K]
    return curves


def _score(
    train: Labelled, queries: Labelled, device: torch.device, seed: int
) -> dict[str, dict[str, float]]:
    grids = queries.features.shape[1] - len(_names(0)) - len(RANKED)
    return robustness(train, queries, device, [*_names(grids), *RANKED])


def summary(score: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Accuracies by title: whole images, half of the patches, the coarsest shuffle, mean of corruptions."""
    corrupted = [value for kind in CORRUPTIONS for value in score[kind].values()]
    shuffled = {"shuffle 2x2": score["shuffle"]["2"]} if "shuffle" in score else {}
    ranked = {f"{kind} 50%": score[kind]["0.5"] for kind in ("salient", "background") if kind in score}
    return {
        "drop 50%": score["drop"]["0.5"],
        **ranked,
        **shuffled,
        "corrupted": sum(corrupted) / len(corrupted),
    }


def curves(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Any:
    """A figure of matplotlib: accuracy over the strength of each kind of damage, a line for each subnet, by
    whose name the scores are."""
    from matplotlib.figure import Figure  # optional, and slow to import

    kinds = [kind for kind in next(iter(scores.values())) if kind != "clean"]
    figure = Figure(figsize=(16.0, 11.0), layout="constrained")
    for axes, kind in zip(figure.subplots(4, 4).ravel(), kinds, strict=False):
        for name, score in scores.items():
            points = {"0": score["clean"]["0"], **score[kind]}
            axes.plot([*points], [100 * value for value in points.values()], "o-", label=name)
        axes.set(title=kind.replace("_", " "), ylabel=f"{REPORTED_K}-NN accuracy, %")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure


ROBUSTNESS = Protocol(
    "robustness",
    "also score images with dropped or shuffled patches and nine corruptions at five levels, by k-NN",
    class_token,
    _score,
    summary,
    "corrupted",
    {
        "protocol": f"{REPORTED_K}-NN of damaged images among whole training images; mean of corruptions",
        "drops": DROPS,
        "levels": LEVELS,
    },
    queries=damaged_tokens,
    baselines=("histogram",),  # patches are ranked by their likeness to the image
)
