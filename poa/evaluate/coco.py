"""Boxes and masks in COCO's JSON: images with their annotations, and the average precision of predictions.

A folder lies as COCO comes: `annotations/instances_train2017.json` describes the images of `train2017/`, and
so for `val`; the year may be missing or another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from poa.data.decode import decode_sized
from poa.data.summary import LeftOut
from poa.errors import InputError, as_input, one_line, optional_package
from poa.files import open_regular, read_json

EXTRA = "detection"
SMALLEST = 0.01  # pixels of a side of a box that is trained on; torchvision takes none without an area


class Example(NamedTuple):
    """An image and its instances, as torchvision's detectors take them.

    Attributes:
        image: float32 `[C, H, W]` in 0..1.
        target: `boxes` float32 `[N, 4]` (x1, y1, x2, y2 in pixels), `labels` int64 `[N]` from 1, and `masks`
            uint8 `[N, H, W]` where there are any. Crowds are left out.
    """

    image: Tensor
    target: dict[str, Tensor]


class CocoImages(Dataset[Example | str]):
    """The images of a part, in order of their ids; one that cannot be read is a text that says why.

    Attributes:
        ids: of the images.
        categories: numbers of the categories, in order; label `i + 1` is `categories[i]`.
        has_masks: whether instances have masks.
        truth: the annotations that are used, an object of faster-coco-eval.
    """

    def __init__(self, folder: Path, content: Mapping[str, list[Any]], has_masks: bool, channels: int):
        self.folder, self.has_masks, self.channels = folder, has_masks, channels
        self.truth = optional_package("faster_coco_eval", EXTRA).COCO()
        self.truth.dataset = dict(content)
        self.truth.createIndex()
        self.ids: list[int] = sorted(self.truth.imgs)
        self.categories: list[int] = sorted(self.truth.cats)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example | str:
        about = self.truth.imgs[self.ids[index]]
        path, size = self.folder / about["file_name"], (about["height"], about["width"])
        try:
            with open_regular(path) as file:
                got, pixels = decode_sized(file, max(size), channels=self.channels)
        except Exception as error:  # damaged files raise what they like, see `decode_sized`
            return f"{path}: {one_line(error)}"
        if (got, pixels.shape[:2]) != (size, size):
            return f"{path}: expected {size[1]}x{size[0]} pixels as annotated, got {got[1]}x{got[0]}"
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        return Example(image, self._target(self.ids[index], *size))

    def with_instances(self) -> list[int]:
        """Positions of images with at least one instance that is no crowd."""
        there = {a["image_id"] for a in self.truth.dataset["annotations"] if not a["iscrowd"]}
        return [index for index, image in enumerate(self.ids) if image in there]

    def _target(self, image: int, height: int, width: int) -> dict[str, Tensor]:
        wanted = [a for a in self.truth.imgToAnns[image] if not a["iscrowd"]]
        corners = torch.tensor([a["bbox"] for a in wanted], dtype=torch.float32).view(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = corners.clamp_min(0).minimum(torch.tensor([width, height, width, height]))
        keep = (boxes[:, 2:] - boxes[:, :2] > SMALLEST).all(1)
        labels = [self.categories.index(a["category_id"]) + 1 for a in wanted]
        target = {"boxes": boxes[keep], "labels": torch.tensor(labels, dtype=torch.int64)[keep]}
        if self.has_masks:
            masks = [self.truth.annToMask(a) for a in wanted]
            stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
            target["masks"] = torch.from_numpy(stacked)[keep]
        return target


def read_coco(folder: Path, channels: int, left_out: LeftOut) -> tuple[CocoImages, CocoImages]:
    """The training and the validation images of a folder; `left_out` counts missing images, and annotations
    that cannot be used.

    Raises InputError: no or several such files, others than COCO's, no images, different categories, or no
    faster-coco-eval.
    """
    optional_package("faster_coco_eval", EXTRA)
    files = [_annotations(folder, part) for part in ("train", "val")]
    contents = []
    for file in files:
        expected = f"{file}: expected the objects images, annotations and categories of COCO"
        content = read_json(file, expected)
        with as_input(expected):
            contents.append({name: list(content[name]) for name in ("images", "annotations", "categories")})
            for name in ("images", "categories"):
                _require_ids(contents[-1][name], f"{file}: expected {name} with integers of their own as id")
            named = [{c["id"]: str(c["name"]) for c in content["categories"]} for content in contents]
    if named[0] != named[1] or not named[0]:
        raise InputError(f"{files[1]}: expected the categories of {files[0].name}, got others or none")
    has_masks = any(a.get("segmentation") for a in contents[0]["annotations"])
    parts = []
    for file, content in zip(files, contents, strict=True):
        images = folder / file.stem.removeprefix("instances_")
        with as_input(f"{file}: expected annotations of COCO"):
            kept = _usable(content, images, named[0], has_masks, left_out)
        part = CocoImages(images, kept, has_masks, channels)
        if not part.with_instances():
            raise InputError(
                f"{file}: expected images with boxes in {images}, got none ({left_out or 'none in the file'})"
            )
        parts.append(part)
    return parts[0], parts[1]


def _annotations(folder: Path, part: str) -> Path:
    files = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
    if len(files) != 1:
        expected = f"one file {folder}/annotations/instances_{part}*.json"
        raise InputError(f"--detection: expected {expected}, got {len(files)}")
    return files[0]


def _require_ids(rows: Sequence[Any], expected: str) -> None:
    """Raise InputError, `expected`: an id is no integer, or is there twice."""
    seen = set[int]()
    for row in rows:
        if type(row["id"]) is not int or row["id"] in seen:
            raise InputError(f"{expected}, got {row['id']!r}{' twice' if row['id'] in seen else ''}")
        seen.add(row["id"])


def _usable(
    content: Mapping[str, list[Any]],
    folder: Path,
    categories: Mapping[int, str],
    has_masks: bool,
    left_out: LeftOut,
) -> dict[str, list[Any]]:
    """The images that are there, and their annotations that can be used, numbered from 1."""
    listed = {image["id"]: image for image in content["images"]}
    there = {number: image for number, image in listed.items() if (folder / image["file_name"]).is_file()}
    for number in listed.keys() - there.keys():
        left_out.add("images that are missing", str(folder / listed[number]["file_name"]))
    kept, seen = list[Any](), set[str]()
    for annotation in content["annotations"]:
        number, of = annotation.get("id"), annotation.get("image_id")
        image = listed.get(of) if type(of) is int else None
        if image is not None and image["id"] not in there:
            continue  # counted with its image
        fault = "annotations whose id another has" if number is not None and str(number) in seen else None
        if fault := fault or _fault(annotation, image, categories, has_masks):
            left_out.add(fault, f"{folder.name}: annotation {number}")
            continue
        seen.add(str(number))
        area = annotation.get("area")
        area = area if _are_numbers([area]) else annotation["bbox"][2] * annotation["bbox"][3]
        filled = {"area": area, "iscrowd": int(annotation.get("iscrowd") or 0)}
        kept.append({**annotation, **filled, "id": len(kept) + 1})  # evaluators match none of id 0
    return {"images": [*there.values()], "annotations": kept, "categories": content["categories"]}


def _fault(
    annotation: Mapping[str, Any],
    image: Mapping[str, Any] | None,
    categories: Mapping[int, str],
    has_masks: bool,
) -> str | None:
    """Why an annotation cannot be used."""
    if image is None:
        return "annotations of images outside the list"
    category = annotation.get("category_id")
    if type(category) is not int or category not in categories:
        return "annotations of categories outside the list"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and _are_numbers(box)):
        return "annotations without a box of four numbers"
    x, y, width, height = box
    inside = min(x + width, image["width"]) > max(x, 0) and min(y + height, image["height"]) > max(y, 0)
    if width <= 0 or height <= 0 or not inside:
        return "boxes that are empty or outside of their image"
    if annotation.get("iscrowd") not in (None, 0, 1):
        return "annotations whose iscrowd is neither 0 nor 1"
    if has_masks and not _is_mask(annotation.get("segmentation"), image["height"], image["width"]):
        return "annotations without a mask that fits their image, beside others with one"
    return None


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _is_mask(value: Any, height: int, width: int) -> bool:
    """Whether a value is run lengths of an image, or polygons of three points and more in or near it."""
    if isinstance(value, dict):
        return value.get("size") == [height, width] and _are_runs(value.get("counts"), height * width)
    side = max(height, width)
    return isinstance(value, list) and bool(value) and all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _are_numbers(p)
        and -side <= min(p) and max(p) <= 2 * side
        for p in value
    )  # fmt: skip


def _are_runs(counts: Any, pixels: int) -> bool:
    """Whether run lengths, a list or COCO's text, are of so many pixels.

    In the text a length has five bits in each character, the lowest first, a sixth that says whether more
    follow, and from the fourth on it is less the length two before.
    """
    if not isinstance(counts, str):
        are_counts = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
        return are_counts and sum(counts) == pixels
    lengths, value, shift = list[int](), 0, 0
    for code in counts.encode():
        bits = code - 48
        if not 0 <= bits < 64:
            return False
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (bits >> 4 & 1) << shift  # the sign
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return shift == 0 and min(lengths, default=-1) >= 0 and sum(lengths) == pixels


def average_precisions(
    truth: Any, predictions: Sequence[Mapping[str, Any]], kind: str, images: Sequence[int]
) -> dict[str, float]:
    """`{"AP": 0..1, "AP50": 0..1, "AP75": 0..1}` by COCO's rules, computed by faster-coco-eval.

    Of the images with these ids; predictions have `image_id`, `category_id`, `score` and `bbox`
    `[x, y, width, height]`, or, of the kind segm, `segmentation` as run lengths.
    """
    if not predictions:
        return dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    api = optional_package("faster_coco_eval", EXTRA)
    evaluation = api.COCOeval_faster(truth, truth.loadRes(list(predictions)), kind, print_function=_unsaid)
    evaluation.params.imgIds = list(images)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = evaluation.stats_as_dict
    return {title: figures[f"AP_{kind}"] for title, kind in (("AP", "all"), ("AP50", "50"), ("AP75", "75"))}


def _unsaid(*_: object) -> None:
    """For a library that would print."""
