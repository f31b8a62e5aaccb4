"""Depth by a linear layer on frozen patch tokens that chooses among bins, scored by RMSE.

A folder holds `train/images`, `train/depth`, `val/images` and `val/depth`; a depth map has the name of its
image and is a NumPy array (`.npy`) of any unit, or a PNG of 16 bits in thousandths of it. 0, NaN and inf are
unknown. The depth of a patch is the mean of the centres of equal bins from the least to the largest training
depth, weighted by the softmax of the layer; it is interpolated bilinearly to pixels. The loss is the
scale-invariant one in logarithms of Eigen et al., NeurIPS 2014.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import InputError
from poa.evaluate.dense import (
    DenseConfig,
    Fault,
    Pair,
    Windows,
    fit_layer,
    pictures,
    png_numbers,
    read_windows,
    to_maps,
)
from poa.evaluate.protocol import OfFolder, folder_protocol
from poa.files import open_regular
from poa.options import option
from poa.subnets import Subnet

CLOSE = 1.25  # ratio of predicted and true depth that counts as right
MEAN_SHARE = 0.15  # of the squared mean error in the loss, beside the variance


@dataclass(frozen=True)
class DepthConfig(DenseConfig, at="monodepth"):
    """How images are seen, and how the depth of their pixels is found."""

    bins: int = option(256, "bins of depth", "[2, 4096]")


class Opened(NamedTuple):
    """Windows of both parts, and how they are learned."""

    train: Windows
    val: Windows
    options: DepthConfig

    def counts(self) -> dict[str, int]:
        return {"train_images": len(self.train.placed), "val_images": len(self.val.placed)}


def depth_pairs(part: Path) -> list[Pair]:
    """Images of a part with what reads their depth, float32 `[H, W]`, 0 where it is unknown."""
    return [
        Pair(image, partial(read_map, part / "depth" / image.stem, 1000))
        for image in pictures(part / "images")
    ]


def read_map(stem: Path, scale: int) -> np.ndarray:
    """Values of pixels, float32 `[H, W]`, 0 where unknown; those of a PNG are `scale` times as large."""
    if (file := stem.parent / f"{stem.name}.npy").exists():
        with open_regular(file) as opened:
            values = np.load(opened, allow_pickle=False)
        if values.dtype.kind not in "fiu":
            raise Fault("targets that are no real numbers", values.dtype)
        with np.errstate(over="ignore"):
            depth = values.astype(np.float32)
    else:
        path = stem.parent / f"{stem.name}.png"
        depth = png_numbers(path, "one number in 16 bits", "I;16B").astype(np.float32) / scale
    known = np.isfinite(depth) & (depth > 0)
    if not known.any():
        raise Fault("targets without a known value")
    return np.where(known, depth, np.float32(0))


def patch_means(depths: Tensor, side: int) -> Tensor:
    """Mean of what is known in each patch of `[N, S, S]`: `[N, side * side]`; 0 where nothing is."""
    known = F.adaptive_avg_pool2d((depths > 0).float()[:, None], side)
    return (F.adaptive_avg_pool2d(depths[:, None], side) / known.clamp_min(1e-6)).flatten(1)


def depth_layer(
    tokens: Tensor, depths: Tensor, options: DepthConfig, seed: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """From patch tokens `[n, P, C]` to depths `[n, P, 1]`, trained by `fit_layer` on tokens `[N, P, C]` and
    depths float32 `[N, S, S]` of training windows, 0 where unknown."""
    means = patch_means(depths, round(tokens.shape[1] ** 0.5))
    known = depths[depths > 0]
    centres = torch.linspace(float(known.min()), float(known.max()), options.bins, device=device)

    def loss(logits: Tensor, chosen: Tensor) -> Tensor:
        truth = means[chosen].to(device)
        there = truth > 0
        error = (logits.softmax(2) @ centres)[there].log() - truth[there].log()
        if len(error) < 2:
            return 0 * logits.sum()
        return (error.var() + MEAN_SHARE * error.mean() ** 2 + 1e-12).sqrt()

    layer = fit_layer(tokens, options.bins, loss, options, seed, device)
    return lambda x: (layer(x).softmax(2) @ centres)[..., None]


def errors(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """`{"rmse", "absrel", "delta1"}` of depths `[H, W]` over the pixels whose depth is known."""
    known = truth > 0
    found, there = predicted[known].double(), truth[known].double()
    ratio = torch.maximum(found / there, there / found)
    return {
        "rmse": float((found - there).square().mean().sqrt()),
        "absrel": float(((found - there).abs() / there).mean()),
        "delta1": float((ratio < CLOSE).double().mean()),
    }


def open_depth(folder: Path, crops: CropsConfig, options: DepthConfig, left_out: LeftOut) -> Opened:
    """Windows of images with depth. Raises InputError: there are none."""
    train, val = (
        read_windows(
            depth_pairs(folder / part), crops, options, left_out,
            f"--monodepth: expected images in {folder / part / 'images'} with depth maps beside",
        )
        for part in ("train", "val")
    )  # fmt: skip
    if not train.targets.any():
        size = crops.global_size
        raise InputError(f"--monodepth: expected known depths in training windows of {size} pixels, got none")
    return Opened(train, val, options)


@torch.no_grad()
def depth(
    backbone: Backbone, subnet: Subnet, opened: Opened, device: torch.device, seed: int
) -> dict[str, float]:
    """Means over the images of `errors`, and of `constant`, the RMSE of the mean training depth."""
    train, val, options = opened
    known, asked = (part.tokens(backbone, subnet, options.batch_size, device) for part in (train, val))
    layer = depth_layer(known, train.targets, options, seed, device)
    mean = train.targets[train.targets > 0].mean()
    rows = [
        errors(found[0], truth) | {"constant": errors(mean.expand_as(truth), truth)["rmse"]}
        for found, truth in val.predictions(lambda part: to_maps(layer(asked[part])))
        if (truth > 0).any()
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


DEPTH = folder_protocol(
    "monodepth",
    "also find the depth of pixels of the images of this folder, with options such as bins=256: RMSE",
    OfFolder(DepthConfig(), open_depth, depth),
    lambda score: {
        "RMSE": score["rmse"],
        "RMSE mean": score["constant"],
        "AbsRel": score["absrel"],
        "d<1.25": score["delta1"],
    },
    "RMSE",
    {"protocol": "depth by a linear layer over bins, mean of images; RMSE mean: of the mean training depth"},
    numbers=("RMSE", "RMSE mean", "AbsRel"),
)
