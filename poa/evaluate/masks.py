"""Folders of images with a class for each pixel, in the layouts they come in.

own        `train/images`, `train/masks`, `val/...`; masks are PNG files with the names of their images,
           whose pixels are numbers of classes, and 255 is ignored; `classes.txt` has a name on each line
ADE20K     `images/training`, `annotations/training`, `.../validation`, of 150 classes; 0 is ignored
COCO       panoptic: `annotations/panoptic_train2017.json` and a folder of the same name with PNG files,
           `train2017` with images, so for `val2017`; things and stuff are classes, crowds are ignored
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from poa.errors import InputError, as_input
from poa.evaluate.dense import Fault, Pair, open_png, pictures, png_numbers
from poa.files import read_json

IGNORED = 255
ADE_CLASSES = 150


def mask_pairs(folder: Path) -> tuple[list[list[Pair]], int]:
    """Pairs of the training and of the validation part, and the number of classes.

    Masks are uint8, 255 where no class is known. Raises InputError: the folder has none of these layouts.
    """
    if (folder / "images" / "training").is_dir():
        return [_ade(folder, part) for part in ("training", "validation")], ADE_CLASSES
    panoptic = [sorted((folder / "annotations").glob(f"panoptic_{part}*.json")) for part in ("train", "val")]
    if all(len(files) == 1 for files in panoptic):
        return _coco(folder, [files[0] for files in panoptic])
    names = folder / "classes.txt"
    if not names.is_file():
        expected = f"{names} with a class on each line, or the layout of ADE20K or of COCO's panoptic masks"
        raise InputError(f"--segmentation: expected {expected}, got none of them")
    with as_input(f"{names}: expected a class on each line"):
        lines = names.read_text(encoding="utf-8").rstrip().splitlines()
    _require_classes(classes := len(lines), names)
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise InputError(f"{names}: expected a class on each line, got an empty line {empty[0]}")
    return [_own(folder / part, classes) for part in ("train", "val")], classes


def _require_classes(count: int, file: Path) -> None:
    """Raise InputError where masks cannot number so many classes beside the ignored one."""
    if not 2 <= count < IGNORED:
        raise InputError(f"{file}: expected 2 to {IGNORED - 1} classes, got {count}")


def _own(part: Path, classes: int) -> list[Pair]:
    return [
        Pair(image, partial(_numbers, part / "masks" / f"{image.stem}.png", classes))
        for image in pictures(part / "images")
    ]


def _numbers(path: Path, classes: int) -> np.ndarray:
    mask = _grey(path)
    if (above := (mask >= classes) & (mask != IGNORED)).any():
        raise Fault(f"masks with classes above {classes - 1}", mask[above].max())
    return _known(mask.astype(np.uint8))


def _grey(path: Path) -> np.ndarray:
    """Numbers of classes; Pillow would scale grey of two and of four bits."""
    kinds = ("1", "L", "I;16B", "P", "P;1", "P;2", "P;4")
    return png_numbers(path, "one number in 1, 8 or 16 bits, or of a palette", *kinds)


def _ade(folder: Path, part: str) -> list[Pair]:
    masks = folder / "annotations" / part
    return [
        Pair(image, partial(_from_one, masks / f"{image.stem}.png"))
        for image in pictures(folder / "images" / part)
    ]


def _from_one(path: Path) -> np.ndarray:
    """Classes are numbered from 1 in the file; 0 becomes 255."""
    mask = _grey(path)
    if (mask > ADE_CLASSES).any():
        raise Fault(f"masks with classes above {ADE_CLASSES}", mask.max())
    return _known(mask.astype(np.uint8) - np.uint8(1))


def _coco(folder: Path, files: Sequence[Path]) -> tuple[list[list[Pair]], int]:
    parts, index = list[list[Pair]](), dict[int, int]()
    for file in files:
        expected = f"{file}: expected COCO's panoptic annotations"
        content = read_json(file, expected)
        with as_input(expected):
            index = index or {c["id"]: i for i, c in enumerate(content["categories"])}
            _require_classes(len(index), file)
            names = {image["id"]: image["file_name"] for image in content["images"]}
            images = folder / file.stem.removeprefix("panoptic_")
            parts.append([
                Pair(
                    images / names[a["image_id"]],
                    partial(_panoptic, file.with_suffix("") / a["file_name"], a["segments_info"], index),
                )
                for a in content["annotations"]
            ])  # fmt: skip
    return parts, len(index)


def _panoptic(path: Path, segments: Sequence[Mapping[str, Any]], index: Mapping[int, int]) -> np.ndarray:
    with open_png(path) as file:
        numbers = np.asarray(file.convert("RGB")).astype(np.int64) @ np.array([1, 256, 65536])
    mask = np.full(numbers.shape, IGNORED, np.uint8)
    for segment in segments:
        if segment["category_id"] not in index:
            raise Fault("masks with categories outside the list", segment["category_id"])
        if not segment.get("iscrowd"):
            mask[numbers == segment["id"]] = index[segment["category_id"]]
    return _known(mask)


def _known(mask: np.ndarray) -> np.ndarray:
    """The mask, which has a class somewhere."""
    if (mask == IGNORED).all():
        raise Fault("masks without a class")
    return mask
