"""Parquet tables, such as those of Hugging Face."""

from __future__ import annotations

import io
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from poa.data.storage.base import NO_PHOTO, Opened, join_labels
from poa.data.storage.remote import Place, is_url, open_place
from poa.data.summary import LeftOut, printable
from poa.errors import DataError, InputError

KEPT_GROUPS = 16  # row groups of Parquet tables that a process keeps
PHOTOS = ("image", "img", "images", "photo", "picture", "jpg", "jpeg", "png", "webp", "image_bytes")
LABELS = ("label", "labels", "fine_label", "class", "cls", "target")


class Parquet:
    """Images in a binary column of Parquet tables, as Hugging Face's datasets write them."""

    def __init__(self, tables: Sequence[ParquetTable]):
        self.paths = [str(table.path) for table in tables]
        self.columns = [table.column for table in tables]
        rows = [count for table in tables for count in table.groups]
        self.file = np.repeat(np.arange(len(tables)), [len(table.groups) for table in tables])
        self.first = np.concatenate([np.arange(len(table.groups)) for table in tables])
        self.ends = np.cumsum(rows, dtype=np.int64)
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": OrderedDict()}

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.ends, index, side="right"))
        return group, index - (int(self.ends[group - 1]) if group else 0)

    def name(self, index: int) -> str:
        group, row = self._place(index)
        return f"{self.paths[self.file[group]]}: row {row} of row group {self.first[group]}"

    def open(self, index: int) -> BinaryIO:
        group, row = self._place(index)
        if group not in self._kept:
            file = self.file[group]
            with _open(self.paths[file]) as table:
                read = table.read_row_group(
                    int(self.first[group]), columns=[self.columns[file]], use_threads=False
                )
            self._kept[group] = read.column(0)
            if len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        value = self._kept[group][row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise ValueError("the row has no image")
        return io.BytesIO(content)

    def identity(self) -> Iterable[bytes | np.ndarray]:
        return self.file, self.ends, *(os.path.basename(path).encode() for path in self.paths)


@dataclass(frozen=True)
class ParquetTable:
    """What is known of one file.

    Attributes:
        path: of the file.
        column: of encoded images.
        groups: rows of each row group.
        label: the column of labels, or "".
        labels: int64 `[rows]`, which of `names`; -1 for none.
        names: of the labels.
        classes: all of them in order, where Hugging Face's metadata have them.
        left_out: columns that were not taken, though they hold encoded files or are called labels.
    """

    path: Place
    column: str
    groups: list[int]
    label: str
    labels: np.ndarray
    names: list[str]
    classes: list[str] | None
    left_out: LeftOut


def open_parquet(paths: Sequence[Place]) -> Opened:
    """Tables with a column of encoded images (binary, or a struct with `bytes`), maybe with one of labels."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise InputError("data: Parquet tables need pyarrow; install it with: pip install pyarrow") from None
    tables: list[ParquetTable] = []
    lost: list[str] = []
    for path in paths:
        try:
            tables.append(_read_table(path))
        except (InputError, DataError):
            raise
        except Exception as error:  # what is damaged raises whatever it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            missing = isinstance(error, FileNotFoundError)
            lost.append(f"{path} is missing" if missing else f"{path} is damaged: {reason}")
    if not sum(sum(table.groups) for table in tables):
        raise InputError(f"data: expected Parquet tables with images, got: {[*lost, 'no rows'][0]}")
    classes = next((table.classes for table in tables if table.classes), None)
    labels, names = join_labels([(table.labels, table.names) for table in tables], classes)
    columns = sorted({f"column {table.label!r}" for table in tables if table.label})
    opened = Opened(Parquet(tables), labels, names, " and ".join(columns), lost=tuple(lost), parts=len(paths))
    for table in tables:
        opened.left_out.update_from(table.left_out)
    return opened


def _open(path: Place | str) -> Any:
    import pyarrow.parquet

    remote = is_url(str(path))
    if not remote and not stat.S_ISREG(os.stat(str(path)).st_mode):
        raise OSError("not a regular file")
    source = open_place(path) if remote else str(path)
    return pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)


def _read_table(path: Place) -> ParquetTable:
    """All of a file but its images.

    Raises:
        InputError: no column of images, or several of which none can be chosen; labels out of range.
        Exception: the file is damaged.
    """
    with _open(path) as table:
        schema, metadata = table.schema_arrow, table.metadata
        features = _features(schema)
        column, others = _image_column(schema, features, path)
        left_out = LeftOut()
        for other in others:
            left_out.add("further columns of images or files", f"{path.name}: {other}")
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if sum(groups) != metadata.num_rows or min(groups, default=0) < 0:
            raise ValueError(f"{sum(groups)} rows in groups of {metadata.num_rows} rows")
        label = _label_column(schema, features)
        for name in set(LABELS) & set(schema.names) if not label else ():
            left_out.add("columns of labels that are no single values", f"{path.name}: {name}")
        labels = np.full(sum(groups), -1)
        names: list[str] = []
        if label:
            labels, names = _labels(table.read(columns=[label]).column(0))
            if len(labels) != sum(groups):
                raise ValueError(f"{len(labels)} labels of {sum(groups)} rows")
    classes = features.get(label, {}).get("names")
    if isinstance(classes, list) and names and all(map(_is_whole, names)):
        named = {name: int(name) for name in names if int(name) >= 0}
        if max(named.values(), default=0) >= len(classes):
            raise InputError(
                f"data: expected labels below {len(classes)} in column {label!r} of {path}, as its metadata "
                f"have so many names, got {max(named.values())}"
            )
        names = [str(classes[named[name]]) if name in named else "" for name in names]
    return ParquetTable(
        path, column, groups, label, labels, names, [*map(str, classes)] if classes else None, left_out
    )


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of each column, where the metadata have it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _image_column(schema: Any, features: dict[str, dict[str, Any]], path: Place) -> tuple[str, list[str]]:
    """The column of images, and the other ones that hold encoded files."""
    import pyarrow as pa

    def encoded(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    every = [field.name for field in schema if encoded(field.type)]
    kinds = {name: features.get(name, {}).get("_type") for name in every}
    possible = [name for name in every if kinds[name] == "Image"] or [n for n in every if not kinds[n]]
    named = [name for wanted in PHOTOS for name in possible if name.lower() == wanted]
    photos = named[:1] or [name for name in possible if not NO_PHOTO.search(name)] or possible
    if len(photos) != 1:
        got = ", ".join(map(printable, photos or schema.names))
        raise InputError(
            f"data: expected a column of encoded images in {path}, one only or one named image, got {got}"
        )
    return photos[0], [name for name in every if name != photos[0]]


def _label_column(schema: Any, features: dict[str, dict[str, Any]]) -> str:
    """The column of labels, or ""."""
    import pyarrow as pa

    def usable(kind: Any) -> bool:
        none = (pa.types.is_nested, pa.types.is_null, pa.types.is_binary, pa.types.is_large_binary)
        return not any(test(kind) for test in none)

    names = [field.name for field in schema if usable(field.type)]
    described = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for wanted in LABELS for name in names if name == wanted]
    return ([name for name in named if name in described] or described[:1] or named or [""])[0]


def _labels(column: Any) -> tuple[np.ndarray, list[str]]:
    """Numbers and names of the labels of a column; null and NaN are none."""
    import pyarrow as pa

    whole = column.combine_chunks()
    if not pa.types.is_dictionary(whole.type):
        whole = whole.dictionary_encode()
    codes = whole.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    values = ["" if value is None or value != value else value for value in whole.dictionary.to_pylist()]
    return codes, [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]
