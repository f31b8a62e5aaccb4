"""The options of fine-tuning, and its recipes: those of the paper by size and data set, and short ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from poa.errors import InputError
from poa.options import Options, option


@dataclass(frozen=True)
class FinetuneConfig(Options, at="finetune"):
    """AdamW with layer-wise learning-rate decay on augmented images."""

    epochs: float = option(30.0, "length in epochs", "(0, 1e6]")
    batch_size: int = option(64, "images per step on one rank", "[1, 65536]")
    lr: float = option(4e-3, "peak learning rate for 512 images per step; scales with images", "(0, 100]")
    min_lr: float = option(1e-6, "learning rate at the end of the cosine schedule", "[0, 100]")
    warmup_epochs: float = option(3.0, "epochs of the linear warm-up of the learning rate", "[0, 1e6]")
    weight_decay: float = option(0.05, "weight decay", "[0, 100]")
    layer_decay: float = option(0.75, "layer-wise learning-rate decay per block, towards the input", "(0, 1]")
    clip: float = option(3.0, "largest gradient norm, of backbone and classifier each; 0: none", "[0, 1e6]")
    drop_path: float = option(0.1, "stochastic-depth rate", "[0, 1)")
    ema: float = option(0.99, "decay of the moving average (EMA) of the weights; 0: no average", "[0, 1)")
    smoothing: float = option(0.1, "label smoothing", "[0, 1)")
    mixup: float = option(0.0, "alpha of mixup; 0: none", "[0, 100]")
    cutmix: float = option(0.0, "alpha of CutMix; 0: none. Of both, each is drawn half the time", "[0, 100]")
    augmentation: Literal["crops", "timm"] = option(
        "crops", "crops: random resized crops and flips on the device; timm: RandAugment and erasing, too"
    )
    scale: tuple[float, float] = option((0.25, 1.0), "range of a crop's area over the image's", "(0, 1]")
    flip: float = option(0.5, "probability of a horizontal flip", "[0, 1]")
    rand_augment: str = option("rand-m9-mstd0.5-inc1-mmax9", "RandAugment, by its name in timm")
    erasing: float = option(0.25, "probability of random erasing, with augmentation=timm", "[0, 1]")
    share: float = option(1.0, "share of the training images of each class, as 0.01", "(0, 1]")
    random_subnets: int = option(1, "random subnets per step besides the largest and smallest", "[0, 64]")
    distill: float = option(
        1.0, "in-place distillation: weight of the largest subnet's output in the targets of others", "[0, 1]"
    )
    seed: int | None = option(
        None, "seed of the share, the order, crops, mixing and subnets; none: the run's", "[0, 4294967295]"
    )
    evaluate_every: float = option(5.0, "epochs between evaluations and checkpoints", "(0, 1e6]")

    def check(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise self.wrong("scale", "the smaller value first")
        if self.warmup_epochs >= self.epochs:
            raise self.wrong("warmup_epochs", f"less than epochs {self.epochs:g}")

    def described(self) -> str:
        """The settings in a line."""
        shown = {
            "epochs": self.epochs, "lr per 512 images": self.lr, "layer decay": self.layer_decay,
            "drop path": self.drop_path, "smoothing": self.smoothing, "mixup": self.mixup,
            "CutMix": self.cutmix, "EMA": self.ema, "share": self.share,
        }  # fmt: skip
        return ", ".join(f"{name} {value:g}" for name, value in shown.items())


def _imagenet(lr: float, layer_decay: float, drop_path: float, warmup: float) -> FinetuneConfig:
    return FinetuneConfig(
        epochs=200,
        batch_size=256,
        lr=lr / 4,  # the paper's are for 2,048 images a step
        warmup_epochs=warmup,
        layer_decay=layer_decay,
        drop_path=drop_path,
        mixup=0.8,
        cutmix=1.0,
        augmentation="timm",
        scale=(0.08, 1.0),
        ema=0.7,
    )


def _transfer(lr: float, epochs: float = 1000) -> FinetuneConfig:
    return replace(_imagenet(4 * lr, 0.75, 0.1, 5), epochs=epochs, batch_size=64, ema=0.0)


RECIPES: dict[str, tuple[FinetuneConfig, str]] = {
    "short": (FinetuneConfig(), "30 epochs of crops and flips, for small data and CPUs"),
    "imagenet-s": (_imagenet(2e-3, 0.55, 0.1, 5), "the paper's, for subnets of the size of ViT-S"),
    "imagenet-b": (_imagenet(7e-4, 0.4, 0.2, 20), "the paper's, for subnets of the size of ViT-B"),
    "imagenet-l": (_imagenet(1.8e-3, 0.6, 0.2, 5), "the paper's, for subnets of the size of ViT-L"),
    "semi": (
        replace(_transfer(2.5e-6), share=0.01, mixup=0.0, cutmix=0.0),
        "semi-supervised: 1 % of the labels; share=0.1 for 10 %",
    ),
    "cifar": (_transfer(7.5e-6), "the paper's transfer to CIFAR-10 and CIFAR-100"),
    "flowers": (_transfer(5e-4), "the paper's transfer to Flowers"),
    "cars": (_transfer(3e-4), "the paper's transfer to Cars"),
    "inat": (_transfer(7.5e-6, epochs=360), "the paper's transfer to iNaturalist"),
}
"""Options by the name of a recipe, and what it is for."""


def recipe(name: str, **changes: Any) -> FinetuneConfig:
    """The options of a recipe, some of them replaced. Raises InputError: there is none of this name."""
    if name not in RECIPES:
        raise InputError(f"--recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return replace(RECIPES[name][0], **changes)
