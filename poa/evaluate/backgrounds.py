"""Backgrounds: k-NN of images before other backgrounds, in folders as those of the Backgrounds Challenge.

A folder holds `original/train/` and, for each variant, `VARIANT/val/`, all with the same class folders;
`original` and `mixed_rand` have to be there. Images of classes that `original/train` lacks are left out.
Source: Xiao et al., "Noise or Signal: The Role of Image Backgrounds in Object Recognition", ICLR 2021, whose
classifiers are of ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from poa.backbones import Backbone
from poa.checkpoint import log
from poa.data.crops import CropsConfig
from poa.data.sources import ImageSource, open_parts
from poa.data.summary import LeftOut
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate.features import extract_features
from poa.evaluate.knn import REPORTED_K, class_token, knn_accuracy
from poa.evaluate.protocol import OfFolder, folder_protocol
from poa.options import Options, option
from poa.subnets import Subnet

ORIGINAL, REPORTED = "original", "mixed_rand"
VARIANTS = (ORIGINAL, "mixed_same", REPORTED, "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")


@dataclass(frozen=True)
class BackgroundsConfig(Options, at="backgrounds"):
    """How the images are read."""

    workers: int = option(0, "processes that read images; 0: none", "[0, 256]")


class Opened(NamedTuple):
    """Training images, those to classify by variant, and how they are seen; what was told of them."""

    train: ImageSource
    variants: Mapping[str, ImageSource]
    crops: CropsConfig
    workers: int
    told: set[str]

    def counts(self) -> dict[str, int]:
        images = {f"{name}_images": len(source) for name, source in self.variants.items()}
        return {"train_images": len(self.train), **images}


def open_backgrounds(
    folder: Path, crops: CropsConfig, options: BackgroundsConfig, left_out: LeftOut
) -> Opened:
    """The images of a folder, with the classes of its training images. Raises InputError: none of them."""
    train = _labelled(folder / ORIGINAL / "train", len(crops.mean), left_out)
    wanted = [name for name in VARIANTS if name in (ORIGINAL, REPORTED) or (folder / name / "val").is_dir()]
    variants = {
        name: _labelled(folder / name / "val", len(crops.mean), left_out, train.classes) for name in wanted
    }
    return Opened(train, variants, crops, options.workers, set())


def _labelled(folder: Path, channels: int, left_out: LeftOut, classes: tuple[str, ...] = ()) -> ImageSource:
    """The images in class folders, of these classes where some are given."""
    if not folder.is_dir():
        raise InputError(f"--backgrounds: expected class folders in {folder}, got no such folder")
    (opened, *_), _, counts = open_parts(str(folder))
    left_out.update_from(counts)
    number = {name: i for i, name in enumerate(classes or opened.classes)}
    if opened.labels is None or len(number) < 2:
        raise InputError(f"--backgrounds: expected class folders in {folder}, got {len(number)} classes")
    labels = np.array([*(number.get(name, -1) for name in opened.classes), -1])[opened.labels]
    if others := np.flatnonzero(labels < 0).tolist():
        left_out.add("images of no class of original/train", opened.images.name(others[0]), len(others))
    source = ImageSource(opened.images, np.arange(len(labels)), labels, tuple(number), channels=channels)
    if not len(source := source.labelled()):
        raise InputError(f"--backgrounds: expected classes of {ORIGINAL}/train in {folder}, got none of them")
    return source


def backgrounds(
    backbone: Backbone, subnet: Subnet, opened: Opened, device: torch.device, seed: int
) -> dict[str, float]:
    """20-NN accuracy of each variant among the training images, by class tokens."""

    def tokens(source: ImageSource) -> tuple[Tensor, Tensor]:
        """Of the images that can be read, with their labels; others are told once."""
        found = extract_features(
            [class_token(backbone, subnet)], source, opened.crops, World(0, 1, device),
            canvas=2 * opened.crops.eval_resize(), workers=opened.workers,
        )  # fmt: skip
        assert found
        if lost := [text for text in found.unreadable if text not in opened.told]:
            log.warning("backgrounds: %d images could not be read, the first is %s", len(lost), lost[0])
            opened.told.update(lost)
        if not len(found.labels):
            raise InputError(
                f"--backgrounds: expected images that can be read, got none: {found.unreadable[0]}"
            )
        return found.features[0], found.labels

    bank, scores = tokens(opened.train), {}
    for name, source in opened.variants.items():
        accuracy = knn_accuracy(*bank, *tokens(source), (REPORTED_K,), device=device)
        scores[name] = accuracy[REPORTED_K]
    return scores


def columns(score: Mapping[str, float]) -> dict[str, float]:
    """Accuracies by title; "BG gap" is what another class's background costs."""
    gap = {"BG gap": score["mixed_same"] - score[REPORTED]} if "mixed_same" in score else {}
    return {name.replace("_", " "): accuracy for name, accuracy in score.items()} | gap


BACKGROUNDS = folder_protocol(
    "backgrounds",
    "also classify the images of this folder before other backgrounds, as of the Backgrounds Challenge: k-NN",
    OfFolder(BackgroundsConfig(), open_backgrounds, backgrounds),
    columns,
    REPORTED.replace("_", " "),
    {"protocol": f"{REPORTED_K}-NN of each variant among original/train; BG gap: mixed same less mixed rand"},
)
