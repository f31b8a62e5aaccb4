"""Digits composed on photographs, with boxes and masks: `python -m helpers.digit_scenes FOLDER 400 100`.

The layouts are COCO's (`FOLDER/coco`) and that of segmentation (`FOLDER/masks`), the images the same. Digits
and photographs are those of scikit-learn: real pictures, composed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SIZES = (16, 36)  # pixels of a digit


def scene(draw: np.random.Generator, side: int, held_out: bool) -> tuple[np.ndarray, list[tuple[int, Any]]]:
    """A picture uint8 `[side, side, 3]`, and class and mask bool `[side, side]` of each digit in it.

    Digits and the part of the photograph that it shows are others where it is `held_out`.
    """
    photos, digits = load_sample_images().images, load_digits()
    photo = photos[draw.integers(2)]
    half = photo.shape[1] // 2
    photo = photo[:, half:] if held_out else photo[:, :half]
    top, left = (draw.integers(0, size - side) for size in photo.shape[:2])
    picture = photo[top : top + side, left : left + side].astype(np.float64)
    found, taken = [], np.zeros((side, side), bool)
    for _ in range(draw.integers(2, 6)):
        index = 4 * draw.integers(len(digits.images) // 4) + (0 if held_out else draw.integers(1, 4))
        size = int(draw.integers(*SIZES))
        y, x = draw.integers(0, side - size, 2)
        grey = Image.fromarray((digits.images[index] * 15).astype(np.uint8))
        alpha = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC)) / 240
        mask = np.zeros((side, side), bool)
        mask[y : y + size, x : x + size] = alpha > 0.5
        if (mask & taken).any():
            continue
        taken |= mask
        patch = picture[y : y + size, x : x + size]
        patch += alpha[..., None].clip(0, 1) * (draw.integers(0, 256, 3) - patch)
        found.append((int(digits.target[index]), mask))
    return picture.round().clip(0, 255).astype(np.uint8), found


def runs(mask: np.ndarray) -> dict[str, Any]:
    """A mask in COCO's run lengths, column by column, the first of what is outside."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def write_scenes(folder: Path, train: int, val: int, side: int = 96, seed: int = 0) -> Path:
    """Write scenes in both layouts; the folder."""
    for part, count in (("train", train), ("val", val)):
        draw, images, annotations = np.random.default_rng([seed, part == "val"]), [], list[Any]()
        for place in (f"coco/{part}", "coco/annotations", f"masks/{part}/images", f"masks/{part}/masks"):
            (folder / place).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, digits = scene(draw, side, part == "val")
            semantic, name = np.zeros((side, side), np.uint8), f"{number:04}.png"
            images.append({"id": number, "file_name": name, "width": side, "height": side})
            for digit, mask in digits:
                semantic[mask] = digit + 1
                (rows,), (columns,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
                box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
                annotations.append({
                    "id": len(annotations), "image_id": number, "category_id": digit, "iscrowd": 0,
                    "bbox": [int(value) for value in box], "area": int(mask.sum()),
                    "segmentation": runs(mask),
                })  # fmt: skip
            for place in (f"coco/{part}", f"masks/{part}/images"):
                Image.fromarray(picture).save(folder / place / name)
            Image.fromarray(semantic).save(folder / "masks" / part / "masks" / name)
        categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "coco/annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    (folder / "masks/classes.txt").write_text("\n".join(["background", *map(str, range(10))]) + "\n")
    return folder


if __name__ == "__main__":
    place, *counts = sys.argv[1:]
    write_scenes(Path(place), *map(int, counts))
