"""Segmentation by frozen patch tokens: a linear classifier and k-NN, scored by the mean IoU of pixels.

linear  batch norm without affine, then a linear layer, trained by AdamW on the shares of classes in each
        patch; logits are interpolated bilinearly to pixels
knn     the 20 nearest patches of the training images vote with their shares, weighted as k-NN's
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.checkpoint import log
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import InputError
from poa.evaluate.dense import DenseConfig, Windows, fit_layer, read_windows, to_maps
from poa.evaluate.knn import REPORTED_K, TEMPERATURE, nearest
from poa.evaluate.masks import IGNORED, mask_pairs
from poa.evaluate.protocol import OfFolder, folder_protocol
from poa.options import option
from poa.subnets import Subnet


@dataclass(frozen=True)
class SegmentationConfig(DenseConfig, at="segmentation"):
    """How images are seen, and how their pixels are classified."""

    bank: int = option(1 << 20, "at most so many training patches that k-NN compares with", "[1, inf)")


class Opened(NamedTuple):
    """Windows of both parts, how many classes they have, and how they are learned."""

    train: Windows
    val: Windows
    classes: int
    options: SegmentationConfig

    def counts(self) -> dict[str, int]:
        images = {"train_images": len(self.train.placed), "val_images": len(self.val.placed)}
        return images | {"classes": self.classes}


def shares(masks: Tensor, side: int, classes: int) -> Tensor:
    """Share of each class in each patch, float32 `[N, side * side, classes]`; 0 of what is ignored."""
    line = torch.arange(masks.shape[-1]) * side // masks.shape[-1]
    places = (line[:, None] * side + line) * (classes + 1) + masks.long().clamp_max(classes)
    counts = torch.zeros(len(masks), side**2 * (classes + 1))
    counts.scatter_add_(1, places.flatten(1), torch.ones(1, 1).expand(len(masks), places[0].numel()))
    counts = counts.view(len(masks), side**2, classes + 1)
    return counts[..., :classes] / counts.sum(2, keepdim=True)


def confusion(predicted: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Pixels by true and predicted class, int64 `[classes, classes]`, of what is not ignored."""
    known = masks != IGNORED
    pairs = masks[known].long() * classes + predicted[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over the classes that are there, in truth or prediction, of intersection over union."""
    hits = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - hits
    return float((hits / union)[union > 0].mean())


def linear_logits(
    tokens: Tensor, masks: Tensor, classes: int, options: SegmentationConfig, seed: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """From patch tokens `[n, P, C]` to logits `[n, P, classes]` of a classifier that is trained by
    `fit_layer` on tokens `[N, P, C]` and masks uint8 `[N, S, S]` of training windows."""
    side = round(tokens.shape[1] ** 0.5)

    def loss(logits: Tensor, chosen: Tensor) -> Tensor:
        target = shares(masks[chosen], side, classes).to(logits.device)
        return -(target * logits.log_softmax(2)).sum(2).mean()

    return fit_layer(tokens, classes, loss, options, seed, device)


def knn_votes(
    tokens: Tensor, masks: Tensor, classes: int, options: SegmentationConfig, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """From patch tokens to votes of the nearest training patches; the arguments are as of `linear_logits`."""
    side = round(tokens.shape[1] ** 0.5)
    windows = min(len(tokens), max(options.bank // tokens.shape[1], 1))
    chosen = torch.linspace(0, len(tokens) - 1, windows).long()
    bank = tokens[chosen].flatten(0, 1)
    parts = [shares(part, side, classes) for part in masks[chosen].split(64)]
    known = torch.cat(parts).flatten(0, 1).to(device)

    def votes(queries: Tensor) -> Tensor:
        asked = F.normalize(queries.to(device).float().flatten(0, 1), dim=1)
        similarity, index = nearest(asked, bank, min(REPORTED_K, len(bank)))
        weights = (similarity / TEMPERATURE).exp()
        return (weights[:, :, None] * known[index]).sum(1).view(*queries.shape[:2], classes)

    return votes


def scored(windows: Windows, tokens: Tensor, logits: Callable[[Tensor], Tensor], classes: int) -> float:
    """Mean IoU of what logits of tokens say of windows, at the size of the masks."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for predicted, mask in windows.predictions(lambda part: to_maps(logits(tokens[part]))):
        counts += confusion(predicted.argmax(0), mask, classes)
    return mean_iou(counts)


def open_scenes(folder: Path, crops: CropsConfig, options: SegmentationConfig, left_out: LeftOut) -> Opened:
    """Windows of the images of a folder of any layout of `mask_pairs`. Raises InputError: it has none of
    them, or no images with masks."""
    pairs, classes = mask_pairs(folder)
    expected = f"--segmentation: expected images with masks in the %s part of {folder}"
    train, val = (
        read_windows(part, crops, options, left_out, expected % name)
        for part, name in zip(pairs, ("training", "validation"), strict=True)
    )
    known, asked = (set(part.targets.unique().tolist()) - {IGNORED} for part in (train, val))
    if not known:
        raise InputError(
            f"{expected % 'training'}, got windows of {crops.global_size} pixels without a class"
        )
    if new := sorted(asked - known):
        log.warning("segmentation: %d of %d validation classes are in no training mask: %s",
                    len(new), len(asked), ", ".join(map(str, new)))  # fmt: skip
    return Opened(train, val, classes, options)


@torch.no_grad()
def segmentation(
    backbone: Backbone, subnet: Subnet, opened: Opened, device: torch.device, seed: int
) -> dict[str, float]:
    """Mean IoU `{"linear": 0..1, "knn": 0..1}` of a subnet on the scenes of `open_scenes`."""
    train, val, classes, options = opened
    known, asked = (part.tokens(backbone, subnet, options.batch_size, device) for part in (train, val))
    linear = linear_logits(known, train.targets, classes, options, seed, device)
    votes = knn_votes(known, train.targets, classes, options, device)
    return {"linear": scored(val, asked, linear, classes), "knn": scored(val, asked, votes, classes)}


SEGMENTATION = folder_protocol(
    "segmentation",
    "also segment the images of this folder, which has masks, with options such as steps=40000: mean IoU",
    OfFolder(SegmentationConfig(), open_scenes, segmentation),
    lambda score: {"mIoU": score["linear"], "mIoU k-NN": score["knn"]},
    "mIoU",
    {
        "protocol": "segmentation by patch tokens, mean IoU of pixels",
        "neighbours": REPORTED_K,
        "temperature": TEMPERATURE,
    },
)
