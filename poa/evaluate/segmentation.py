"""Segmentation by frozen patch tokens: a linear classifier and k-NN, scored by the mean IoU of pixels.

A folder holds `train/images`, `train/masks`, `val/images` and `val/masks`; a mask has the name of its image
and ends in .png, its pixels are numbers of classes, and 255 is ignored. Images and masks are stretched to the
square that the network sees.

    linear  batch norm without affine, then a linear layer, trained by AdamW on the shares of classes in each
            patch; logits are interpolated bilinearly to pixels
    knn     the 20 nearest patches of the training images vote with their shares, weighted as k-NN's
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from poa.backbones import Backbone
from poa.data.crops import CropsConfig
from poa.data.decode import decode
from poa.data.summary import LeftOut
from poa.errors import InputError
from poa.evaluate.knn import REPORTED_K, TEMPERATURE, nearest
from poa.evaluate.protocol import OfFolder, folder_protocol
from poa.files import open_regular
from poa.options import Options, option
from poa.random import torch_stream
from poa.subnets import Subnet

IGNORED = 255


@dataclass(frozen=True)
class SegmentationConfig(Options, at="segmentation"):
    """How the linear classifier is trained: AdamW with a cosine schedule."""

    steps: int = option(1000, "steps", "[1, 1e7]")
    batch_size: int = option(16, "images per step", "[1, 4096]")
    lr: float = option(1e-3, "learning rate at the beginning", "(0, 10]")
    weight_decay: float = option(1e-3, "weight decay", "[0, 1]")


@dataclass(frozen=True)
class Scenes:
    """Images with their masks.

    Attributes:
        images: normalised, float32 `[N, C, S, S]`.
        masks: uint8 `[N, S, S]`, 255 where no class is known.
    """

    images: Tensor
    masks: Tensor


class Opened(NamedTuple):
    """Scenes of both parts, how many classes they have, and how they are learned."""

    train: Scenes
    val: Scenes
    classes: int
    options: SegmentationConfig


def read_scenes(folder: Path, classes: int, crops: CropsConfig, left_out: LeftOut) -> Scenes:
    """The images of `folder/images` with masks in `folder/masks`, in order of their names.

    Args:
        folder: of a split.
        classes: how many; masks with others are left out.
        crops: size and normalisation.
        left_out: counts images without a mask of their size and classes.

    Raises:
        InputError: no image with its mask is there.
    """
    size, images, masks = crops.global_size, [], []
    std, mean = (torch.tensor(values)[:, None, None] for values in (crops.std, crops.mean))
    for path in sorted((folder / "images").glob("*")):
        try:
            with open_regular(path) as file:
                pixels = decode(file, 4096, channels=len(crops.mean))
            with Image.open(folder / "masks" / f"{path.stem}.png") as file:
                mask = np.asarray(file)
        except Exception as error:  # damaged files raise what they like, see `decode_sized`
            left_out.add("images or masks that cannot be read", f"{path}: {error}")
            continue
        if mask.shape != pixels.shape[:2]:
            left_out.add("masks of another size than their image", str(path))
        elif ((mask >= classes) & (mask != IGNORED)).any():
            left_out.add(f"masks with classes above {classes - 1}", str(path))
        else:
            x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)[0]
            images.append((x - mean) / std)
            square = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
            masks.append(torch.from_numpy(np.asarray(square).copy()))
    if not images:
        expected = f"images in {folder / 'images'} with masks (.png) in {folder / 'masks'}"
        raise InputError(f"--segmentation: expected {expected}, got none ({left_out})")
    return Scenes(torch.stack(images), torch.stack(masks))


def shares(masks: Tensor, side: int, classes: int) -> Tensor:
    """Share of each class in each patch, float32 `[N, side * side, classes]`; 0 of what is ignored."""
    one_hot = F.one_hot(masks.long().clamp_max(classes), classes + 1)[..., :classes]
    pooled = F.adaptive_avg_pool2d(one_hot.permute(0, 3, 1, 2).float(), side)
    return pooled.flatten(2).transpose(1, 2)


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
    tokens: Tensor,
    targets: Tensor,
    queries: Tensor,
    options: SegmentationConfig,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Logits `[M, P, classes]` of query patches by a linear classifier of training patches.

    Args:
        tokens, targets: `[N, P, C]` and their `shares`.
        queries: `[M, P, C]`.
        options: of the training.
        seed: of weights and batches.
        device: to compute on.
    """
    draw, classes = torch_stream(seed, "segmentation"), targets.shape[2]
    flat = tokens.flatten(0, 1).float()
    mean, deviation = flat.mean(0).to(device), flat.std(0).to(device) + 1e-5
    layer = nn.Linear(tokens.shape[2], classes)
    nn.init.normal_(layer.weight, std=0.01, generator=draw)
    nn.init.zeros_(layer.bias)
    layer = layer.to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    with torch.enable_grad():
        for _ in range(options.steps):
            chosen = torch.randint(len(tokens), (options.batch_size,), generator=draw)
            x = (tokens[chosen].to(device).float() - mean) / deviation
            y = targets[chosen].to(device)
            loss = -(y * layer(x).log_softmax(2)).sum(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return layer((queries.to(device).float() - mean) / deviation).cpu()


def knn_logits(tokens: Tensor, targets: Tensor, queries: Tensor, device: torch.device) -> Tensor:
    """Votes `[M, P, classes]` of the nearest training patches; arguments are as of `linear_logits`."""
    bank, known = tokens.flatten(0, 1), targets.flatten(0, 1).to(device)
    votes = []
    for image in queries:
        asked = F.normalize(image.to(device).float(), dim=1)
        similarity, index = nearest(asked, bank, min(REPORTED_K, len(bank)))
        weights = (similarity / TEMPERATURE).exp()
        votes.append((weights[:, :, None] * known[index]).sum(1).cpu())
    return torch.stack(votes)


def scored(logits: Tensor, masks: Tensor) -> float:
    """Mean IoU of patch logits `[M, P, classes]`, interpolated to masks `[M, S, S]`."""
    side, classes = round(logits.shape[1] ** 0.5), logits.shape[2]
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for row, mask in zip(logits, masks, strict=True):
        maps = row.t().view(1, classes, side, side)
        pixels = F.interpolate(maps, mask.shape, mode="bilinear", align_corners=False)
        counts += confusion(pixels[0].argmax(0), mask, classes)
    return mean_iou(counts)


def open_scenes(folder: Path, crops: CropsConfig, options: SegmentationConfig, left_out: LeftOut) -> Opened:
    """Training and validation scenes of a folder, and the number of classes, which `classes.txt` names.

    Raises:
        InputError: one of them is missing.
    """
    names = folder / "classes.txt"
    if not names.is_file():
        raise InputError(f"--segmentation: expected {names} with a class on each line, got no such file")
    classes = len(names.read_text(encoding="utf-8").splitlines())
    if not 2 <= classes < IGNORED:
        raise InputError(f"{names}: expected 2 to {IGNORED - 1} classes, got {classes}")
    train, val = (read_scenes(folder / part, classes, crops, left_out) for part in ("train", "val"))
    return Opened(train, val, classes, options)


@torch.no_grad()
def segmentation(
    backbone: Backbone, subnet: Subnet, opened: Opened, device: torch.device, seed: int
) -> dict[str, float]:
    """Mean IoU `{"linear": 0..1, "knn": 0..1}` of a subnet on the scenes of `open_scenes`."""
    train, val, classes, options = opened

    def tokens(images: Tensor) -> Tensor:
        parts = [
            backbone([x.to(device)], subnet)[0].patches.half().cpu() for x in images.split(options.batch_size)
        ]
        return torch.cat(parts)

    known, asked = tokens(train.images), tokens(val.images)
    targets = shares(train.masks, round(known.shape[1] ** 0.5), classes)
    return {
        "linear": scored(linear_logits(known, targets, asked, options, seed, device), val.masks),
        "knn": scored(knn_logits(known, targets, asked, device), val.masks),
    }


SEGMENTATION = folder_protocol(
    "segmentation",
    "also segment the images of this folder, which has masks, with options such as steps=40000: mean IoU",
    OfFolder(SegmentationConfig(), open_scenes, segmentation),
    lambda score: {"mIoU": score["linear"], "mIoU k-NN": score["knn"]},
    "mIoU",
    {
        "protocol": "segmentation by patch tokens, mean IoU of pixels of stretched images",
        "neighbours": REPORTED_K,
        "temperature": TEMPERATURE,
    },
)
