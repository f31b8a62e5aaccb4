"""Near-duplicates: pairs of images, of one collection or across two, whose features are alike."""

from __future__ import annotations

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from poa.data.preprocessing import Preprocessing
from poa.data.sources import ImageSource, open_parts
from poa.embedding.nearest import Neighbour, figure_row, html_page
from poa.errors import InputError, as_input
from poa.files import read_json, write_json, write_text
from poa.subnets import depth_text

BLOCK = 4096  # images that are compared with as many others at a time
COLUMNS = ("similarity", "first", "second", "first_label", "second_label")
SAME = ("sha256", "preprocessing")  # of models that give the same features
Place = tuple[ImageSource, int]


@dataclass(frozen=True)
class FeatureFile:
    """What `poa embed` wrote.

    Attributes:
        features: `[images, C]`; those of a `.npy` file stay on the disk.
        names, labels: of the images.
        about: the model, and the images' `data`.
    """

    features: np.ndarray
    names: Sequence[str]
    labels: Sequence[str | None]
    about: dict[str, Any]

    def require_model_of(self, other: FeatureFile) -> None:
        """Raise InputError where the features are not of the same weights and pre-processing."""
        first, second = models = [file.about["model"] for file in (self, other)]
        keys = SAME if all("sha256" in model for model in models) else first.keys() | second.keys()
        if any(first.get(key) != second.get(key) for key in keys):
            names = [
                f"{model['width']}x{depth_text(model['depth'])} of {model['source']}" for model in models
            ]
            raise InputError(f"pairs: expected features of one model, got those of {' and '.join(names)}")


class Pairs(NamedTuple):
    """Pairs of images, the most similar first.

    Attributes:
        similarity: cosines float32 `[pairs]`.
        positions: int64 `[pairs, 2]`, in the first and in the second collection.
        total: of all such pairs, also of those that are not among them.
    """

    similarity: Tensor
    positions: Tensor
    total: int


def read_features(path: Path, token: str) -> FeatureFile:
    """Features of a token in a file of `poa embed`, `.npy`, `.npz` or `.parquet`. Raises InputError: it is
    none, or has no such features `[images, C]`."""
    expected = f"{path}: expected features {token} of poa embed, one row for each image"
    if not path.is_file():
        raise InputError(f"{expected}, got no file")
    with as_input(expected):
        if path.suffix == ".npy":
            listed = read_json(path.with_suffix(".json"), expected)
            names, labels = ([row[key] for row in listed["images"]] for key in ("name", "label"))
            read = FeatureFile(np.load(path, mmap_mode="r"), names, labels, listed["about"])
            if listed.get("crc32", crc := _crc32(read.features)) != crc:
                raise InputError(f"{expected}, got another one than {path.with_suffix('.json')} tells of")
        elif path.suffix == ".parquet":
            read = _of_parquet(path, token)
        else:
            with zipfile.ZipFile(path), np.load(path) as packed:
                names, labels = packed["names"].tolist(), [label or None for label in packed["labels"]]
                read = FeatureFile(packed[token], names, labels, json.loads(str(packed["about"])))
        Preprocessing.from_dict(read.about["model"]["preprocessing"])
    if read.features.ndim != 2 or len(read.features) != len(read.names):
        raise InputError(f"{expected}, got {list(read.features.shape)} and {len(read.names)} names")
    return read


def _crc32(features: np.ndarray) -> int:
    """Of all values, in memory that does not grow with them."""
    crc = 0
    for start in range(0, len(features), BLOCK):
        crc = zlib.crc32(np.ascontiguousarray(features[start : start + BLOCK]).data, crc)
    return crc


def _of_parquet(path: Path, token: str) -> FeatureFile:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["name", "label", token])
    values = table[token].combine_chunks()
    names, labels = (table[name].to_pylist() for name in ("name", "label"))
    features = values.flatten().to_numpy(zero_copy_only=False).reshape(len(names), -1)
    return FeatureFile(features, names, labels, json.loads(table.schema.metadata[b"poa"]))


def non_finite(features: np.ndarray) -> int:
    """How many rows of `[images, C]` have NaN or inf."""
    blocks = (features[start : start + BLOCK] for start in range(0, len(features), BLOCK))
    return sum(int((~np.isfinite(block)).any(1).sum()) for block in blocks)


@torch.no_grad()
def similar_pairs(
    first: np.ndarray, second: np.ndarray | None, least: float, most: int, device: torch.device
) -> Pairs:
    """Pairs whose cosine similarity is `least` or more, `most` of them, in memory that depends on `most`.

    Args:
        first: features `[N, C]`.
        second: those `[M, C]` of another collection; None: pairs within the first, each of them once.
        least: cosine similarity.
        most: pairs that are kept, the most similar.
        device: to compute on.

    Raises:
        InputError: features of different widths.

    Example:
        >>> import numpy as np, torch
        >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]], np.float32)
        >>> similar_pairs(x, None, 0.9, 10, torch.device("cpu")).positions.tolist()
        [[0, 2]]
    """
    others = first if second is None else second
    if first.shape[1] != others.shape[1]:
        raise InputError(f"pairs: expected features of one width, got {first.shape[1]} and {others.shape[1]}")

    def unit(features: np.ndarray, start: int) -> Tensor:
        rows = torch.from_numpy(np.array(features[start : start + BLOCK], np.float32))
        return F.normalize(rows.to(device), dim=1)

    best = Pairs(torch.zeros(0), torch.zeros(0, 2, dtype=torch.int64), 0)
    for start in range(0, len(first), BLOCK):
        x = unit(first, start)
        for other in range(start if second is None else 0, len(others), BLOCK):
            cosines = x @ unit(others, other).T
            alike = cosines >= least
            if second is None and other == start:
                alike.triu_(1)
            places = alike.nonzero()
            values = torch.cat([best.similarity, cosines[alike].cpu()])
            offset = torch.tensor([start, other])
            positions = torch.cat([best.positions, places.cpu() + offset])
            order = values.argsort(descending=True, stable=True)[:most]
            best = Pairs(values[order], positions[order], best.total + len(places))
    return best


def pair_rows(pairs: Pairs, first: FeatureFile, second: FeatureFile) -> list[dict[str, Any]]:
    """Pairs as rows of `COLUMNS`."""
    return [
        dict(zip(COLUMNS, (round(cosine, 6), first.names[i], second.names[j], first.labels[i],
                           second.labels[j]), strict=True))
        for cosine, (i, j) in zip(pairs.similarity.tolist(), pairs.positions.tolist(), strict=True)
    ]  # fmt: skip


def write_pairs(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write rows of pairs, as CSV or as JSON with what they depend on."""
    if path.suffix == ".json":
        write_json(path, {"about": about, "pairs": rows})
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def pairs_page(rows: Sequence[dict[str, Any]], first: FeatureFile, second: FeatureFile) -> str:
    """HTML: the two images of each pair side by side. Raises InputError: images that are not there."""
    shown = [
        _images(file, {str(row[side]) for row in rows})
        for file, side in ((first, "first"), (second, "second"))
    ]
    lines = (
        figure_row([
            Neighbour(row["similarity"], *places[row[side]])
            for places, side in zip(shown, ("first", "second"), strict=True)
        ])
        for row in rows
    )  # fmt: skip
    return html_page(lines)


def _images(file: FeatureFile, names: set[str]) -> dict[str, Place]:
    """Where images of these names lie."""
    pixels, places = Preprocessing.from_dict(file.about["model"]["preprocessing"]), dict[str, Place]()
    for part in open_parts(str(file.about["data"]), 1.0)[0]:
        source = replace(ImageSource.whole(part), bits=pixels.bits, channels=pixels.channels)
        for position in range(len(source)):
            name = source.name(position).encode("utf-8", "backslashreplace").decode()
            if name in names:
                places.setdefault(name, (source, position))
    if lost := sorted(names - places.keys()):
        raise InputError(f"--page: expected image {lost[0]} in {file.about['data']}, got none of this name")
    return places
