"""Digits before photographs that tell their class, and before others: `python -m helpers.digit_backgrounds
FOLDER 1000 300`, in the layout of the Backgrounds Challenge.

Digits and photographs are those of scikit-learn. Each of five classes has a strip of a photograph of its own.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

CLASSES, SIDE = 5, 32
VARIANTS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_t")


@cache
def photographs() -> list[np.ndarray]:
    return list(load_sample_images().images)


def background(draw: np.random.Generator, label: int) -> np.ndarray:
    """Float64 `[SIDE, SIDE, 3]` out of the strip of a class."""
    photo = photographs()[label % 2]
    width = photo.shape[1] // CLASSES
    top, left = draw.integers(0, photo.shape[0] - 2 * SIDE), draw.integers(0, width - 2 * SIDE)
    tile = photo[top : top + 2 * SIDE, label * width + left : label * width + left + 2 * SIDE]
    return np.asarray(Image.fromarray(tile).resize((SIDE, SIDE)), np.float64)


def variant(name: str, draw: np.random.Generator, digit: np.ndarray, label: int) -> Image.Image:
    """A digit `[8, 8]` before what its class has, or another, by the name of a variant."""
    other = {"mixed_rand": int(draw.integers(CLASSES)), "mixed_next": (label + 1) % CLASSES}.get(name, label)
    behind = np.zeros((SIDE, SIDE, 3)) if name == "only_fg" else background(draw, other)
    grey = Image.fromarray((digit * 15).astype(np.uint8)).resize((SIDE // 2, SIDE // 2))
    alpha = np.asarray(grey)[..., None] / 240
    y, x = draw.integers(0, SIDE // 2, 2)
    part = behind[y : y + SIDE // 2, x : x + SIDE // 2]
    if name != "only_bg_t":
        part += alpha * ((0 if name == "no_fg" else 255) - part)
    return Image.fromarray(behind.round().astype(np.uint8))


def write_backgrounds(folder: Path, train: int, val: int, seed: int = 0) -> Path:
    """Write so many images of `original/train` and of `val` of every variant; the folder."""
    digits = load_digits()
    known = np.flatnonzero(digits.target < CLASSES)
    for name in VARIANTS:
        for part, count in (("train", train), ("val", val)):
            if part == "train" and name != "original":
                continue
            draw = np.random.default_rng([seed, VARIANTS.index(name), part == "val"])
            chosen = [i for i in known if (i % 4 == 0) == (part == "val")]
            for number in range(count):
                index = int(draw.choice(chosen))
                place = folder / name / part / f"digit{digits.target[index]}"
                place.mkdir(parents=True, exist_ok=True)
                picture = variant(name, draw, digits.images[index], int(digits.target[index]))
                picture.save(place / f"{number:04}.png")
    return folder


if __name__ == "__main__":
    place, *counts = sys.argv[1:]
    write_backgrounds(Path(place), *map(int, counts))
