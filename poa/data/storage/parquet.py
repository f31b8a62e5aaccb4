"""Parquet tables, such as those of Hugging Face."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from poa.data.storage.base import Opened
from poa.errors import InputError

KEPT_GROUPS = 16  # row groups of Parquet tables that a process keeps


class Parquet:
    """Images in a binary column of Parquet tables, as Hugging Face's datasets write them."""

    def __init__(self, paths: Sequence[Path], column: str, groups: Sequence[Sequence[int]]):
        self.paths = [str(path) for path in paths]
        self.column = column
        rows = [count for counts in groups for count in counts]
        self.file = np.repeat(np.arange(len(paths)), [len(counts) for counts in groups])
        self.first = np.concatenate([np.arange(len(counts)) for counts in groups])
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
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(self.paths[self.file[group]]) as table:
                read = table.read_row_group(int(self.first[group]), columns=[self.column], use_threads=False)
            self._kept[group] = read.column(0)
            if len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        value = self._kept[group][row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise ValueError("the row holds no image")
        return io.BytesIO(content)


def open_parquet(paths: Sequence[Path]) -> Opened:
    """Tables with a column of encoded images (binary, or a struct with `bytes`), maybe with `label`."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("data: Parquet tables need pyarrow; install it with: pip install pyarrow") from None
    found, groups, labels, lost = [], [], [], []
    column, classes = "", None
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                column, label = _columns(table.schema_arrow, path)
                sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
                of_rows = table.read(columns=[label]).column(0).to_pylist() if label else None
                names = _class_names(table.schema_arrow, label)
        except (OSError, pyarrow.ArrowException) as error:
            damage = "is missing" if not path.exists() else f"is damaged: {error}"
            lost.append(f"{path} {damage}")
            continue
        classes = classes or names
        found.append(path)
        groups.append(sizes)
        labels.append(of_rows)
    if not found:
        raise InputError(f"data: expected Parquet tables with images, got: {lost[0]}")
    known = None
    if all(part is not None for part in labels):
        known = np.array([-1 if v is None else v for part in labels for v in part], dtype=np.int64)  # type: ignore[union-attr]
        classes = classes or tuple(str(label) for label in range(known.max() + 1))
    storage = Parquet(found, column, groups)
    return Opened(storage, known, classes or (), tuple(lost), len(paths))


def _columns(schema: Any, path: Path) -> tuple[str, str | None]:
    """The column of images and that of labels."""
    import pyarrow as pa

    def encoded(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    images = [field.name for field in schema if encoded(field.type)]
    if not images:
        raise InputError(
            f"data: expected a column of encoded images in {path}, got {', '.join(schema.names)}"
        )
    labels = [f.name for f in schema if f.name in ("label", "labels") and pa.types.is_integer(f.type)]
    return images[0], labels[0] if labels else None


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Names of the labels, where Hugging Face's metadata have them."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if not metadata or label is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(label, {})
    return tuple(feature["names"]) if "names" in feature else None
