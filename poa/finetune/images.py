"""Images of fine-tuning: which of them, their augmentation, and the mixing of images and labels."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from poa.data.augment import random_crops
from poa.data.crops import CropsConfig
from poa.data.loader import Canvases, Transform
from poa.data.preprocessing import Preprocessing
from poa.data.sources import ImageSource
from poa.errors import InputError, optional_package
from poa.finetune.options import FinetuneConfig
from poa.random import stream_seed, torch_stream


def stratified(source: ImageSource, share: float, seed: int) -> ImageSource:
    """A share of the images of each class, at least one, drawn by a seed; in order."""
    if share == 1:
        return source
    assert source.labels is not None
    draw = np.random.default_rng(stream_seed(seed, "share"))
    chosen: list[int] = []
    for label in np.unique(source.labels):
        members = draw.permutation(np.flatnonzero(source.labels == label))
        chosen += members[: max(round(share * len(members)), 1)].tolist()
    return source.subset(np.sort(np.array(chosen, dtype=np.int64)))


class Augmentation:
    """From decoded training images to what the networks see, a function of the seed and the step.

    Size and normalisation are those of the crops of the run. Raises InputError: timm is asked for, and not
    installed or the images have other than three channels.
    """

    def __init__(self, options: FinetuneConfig, crops: CropsConfig, seed: int):
        self.options, self.seed = options, seed
        self.crops = replace(
            crops,
            global_scale=options.scale,
            flip=options.flip,
            rotation=0.0,
            jitter=0.0,
            grayscale=0.0,
            blur=(0.0, 0.0, 0.0),
            solarize=(0.0, 0.0, 0.0),
        )
        if options.augmentation == "timm" and len(crops.mean) != 3:
            raise InputError(f"augmentation: expected crops of {len(crops.mean)} channels, got timm's of 3")
        self.timm = optional_package("timm.data", "timm") if options.augmentation == "timm" else None

    def transform(self) -> Transform | None:
        """What decoding processes do to an image; None: nothing."""
        if self.timm is None:
            return None
        return _RandAugment(self.options, self.crops.global_size, self.seed)

    def __call__(self, canvases: Canvases, device: torch.device, step: int, rank: int) -> Tensor:
        """Normalised images, float32 `[B, C, S, S]`."""
        images = canvases.images.to(device, non_blocking=True)
        if self.timm is None:
            draw = torch_stream(self.seed, "fine-tuning crops", step, rank)
            return random_crops(images, canvases.sizes, self.crops, draw)
        size = self.crops.global_size
        pixels = replace(Preprocessing.of(self.crops), resize=size).crop(images, canvases.sizes)
        seed = stream_seed(self.seed, "erasing", step, rank)
        erasing = self.timm.random_erasing.RandomErasing(self.options.erasing, mode="pixel", device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            random.seed(seed)
            return erasing(pixels)


class _RandAugment:
    """The random resized crop, flip and RandAugment of timm."""

    def __init__(self, options: FinetuneConfig, size: int, seed: int):
        self.options, self.size, self.seed = options, size, seed
        self.made: Any = None

    def __call__(self, image: np.ndarray, position: int) -> np.ndarray:
        if self.made is None:  # in the process that decodes
            self.made = optional_package("timm.data", "timm").create_transform(
                self.size,
                is_training=True,
                use_prefetcher=True,
                scale=self.options.scale,
                hflip=self.options.flip,
                auto_augment=self.options.rand_augment,
                interpolation="bicubic",
            )
        seed = stream_seed(self.seed, "RandAugment", position) % 2**32
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002, which RandAugment draws from
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            pixels = self.made(Image.fromarray(image))
        return np.ascontiguousarray(np.asarray(pixels).transpose(1, 2, 0))


def mixed(
    images: Tensor, labels: Tensor, classes: int, options: FinetuneConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image and its label with the one at the other end of the batch, by mixup or CutMix.

    Mixup: `lam x + (1 - lam) x'`, `lam ~ Beta(alpha, alpha)`. CutMix: a box of the area `1 - lam` comes from
    the other image, and `lam` is the share of what is left. Zhang et al., 2018; Yun et al., 2019.

    Args:
        images: `[B, C, S, S]`.
        labels: int64 `[B]`.
        classes: how many there are.
        options: alphas, and the smoothing of labels.
        generator: CPU generator.

    Returns:
        The images, and targets float32 `[B, classes]`, which sum to 1.
    """
    off = options.smoothing / classes
    targets = F.one_hot(labels, classes).float() * (1 - options.smoothing) + off
    alphas = [(alpha, cut) for alpha, cut in ((options.mixup, False), (options.cutmix, True)) if alpha > 0]
    if not alphas:
        return images, targets
    chosen = int(torch.randint(len(alphas), (1,), generator=generator))
    alpha, cut = alphas[chosen]
    seed = int(torch.randint(2**31, (1,), generator=generator))
    lam = float(np.random.default_rng(seed).beta(alpha, alpha))
    if cut:
        size = images.shape[-1]
        side = round(size * (1 - lam) ** 0.5)
        center = torch.randint(size, (2,), generator=generator)
        (top, left), (bottom, right) = (
            (center + shift).clamp(0, size).tolist() for shift in (-(side // 2), side - side // 2)
        )
        images = images.clone()
        images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / size**2
    else:
        images = lam * images + (1 - lam) * images.flip(0)
    return images, lam * targets + (1 - lam) * targets.flip(0)
