"""Where encoded images lie: memory, files, tar shards, Parquet tables. All are read by position.

Tables of names and offsets are flat arrays, which the forks of a loader share, however many images there are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from poa.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KEPT_GROUPS = 16  # row groups of Parquet tables that a process keeps


class Storage(Protocol):
    """Encoded images by position."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in messages."""

    def open(self, index: int) -> BinaryIO | np.ndarray:
        """An encoded image, or decoded pixels uint8 `[H, W, 3]`."""


class Strings(Sequence[str]):
    """Many strings in one array of bytes."""

    def __init__(self, values: Iterable[str]):
        encoded = [os.fsencode(value) for value in values]
        self.ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.bytes[start : int(self.ends[index])].tobytes())


class Arrays:
    """Pixels in memory."""

    def __init__(self, images: Sequence[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> np.ndarray:
        return self.images[index]


class Files:
    """A file an image."""

    def __init__(self, paths: Iterable[Path | str]):
        self.paths = Strings(str(path) for path in paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> BinaryIO:
        return open(self.paths[index], "rb")


@dataclass(frozen=True)
class Opened:
    """A storage with what is known of its images.

    Attributes:
        images: the storage.
        labels: int64 `[images]`, or None.
        classes: names of the labels.
        lost: shards that are missing or damaged, and how.
        shards: how many there should be.
    """

    images: Storage
    labels: np.ndarray | None
    classes: tuple[str, ...]
    lost: tuple[str, ...] = ()
    shards: int = 1


class Shards:
    """Images in uncompressed tar files, read by offset."""

    def __init__(self, paths: Sequence[Path], tables: Sequence[ShardTable]):
        self.paths = [str(path) for path in paths]
        self.shard = np.repeat(np.arange(len(paths)), [len(t.offsets) for t in tables])
        self.offsets = np.concatenate([t.offsets for t in tables])
        self.sizes = np.concatenate([t.sizes for t in tables])
        self.names = Strings(name for t in tables for name in t.names)

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, index: int) -> str:
        return f"{self.paths[self.shard[index]]}:{self.names[index]}"

    def open(self, index: int) -> BinaryIO:
        with open(self.paths[self.shard[index]], "rb", buffering=0) as file:
            file.seek(int(self.offsets[index]))
            return io.BytesIO(file.read(int(self.sizes[index])))


@dataclass(frozen=True)
class ShardTable:
    """The images of one tar file.

    Attributes:
        names: of the members.
        offsets, sizes: int64, bytes.
        labels: int64, -1 where a sample has none.
        damage: what is wrong with the file, if anything; the table holds what comes before.
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: str


def open_shards(paths: Sequence[Path]) -> Opened:
    """Tar files in WebDataset layout: `KEY.jpg` and, with a label, `KEY.cls` beside it, a number.

    A file is listed once; the table is kept in the user's cache folder and made again when the file changes.
    """
    found, tables, lost = [], [], []
    for path in paths:
        if not path.exists():
            lost.append(f"{path} is missing")
            continue
        table = _cached_table(path)
        if table.damage:
            lost.append(f"{path}: {table.damage}; {len(table.names)} images come before")
        found.append(path)
        tables.append(table)
    if not any(table.names for table in tables):
        raise InputError(
            f"data: expected tar files with images, got none in {len(paths)} files from {paths[0]} on"
            + (f" ({lost[0]})" if lost else "")
        )
    labels = np.concatenate([t.labels for t in tables])
    classes = tuple(str(label) for label in range(labels.max() + 1))
    labelled = labels.min() >= 0
    return Opened(
        Shards(found, tables),
        labels if labelled else None,
        classes if labelled else (),
        tuple(lost),
        len(paths),
    )


def _cached_table(path: Path) -> ShardTable:
    state = path.stat()
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poa" / "shards"
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(file) as kept:
            names = json.loads(kept["text"].tobytes())
            return ShardTable(names[1:], kept["offsets"], kept["sizes"], kept["labels"], names[0])
    except (OSError, ValueError, KeyError):
        table = list_shard(path)
    text = np.frombuffer(json.dumps([table.damage, *table.names]).encode(), dtype=np.uint8)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as handle:
            np.savez(handle, text=text, offsets=table.offsets, sizes=table.sizes, labels=table.labels)
        partial.replace(file)
    except OSError:
        pass  # a cache is a convenience
    return table


def list_shard(path: Path) -> ShardTable:
    """List a tar file; of a damaged one what comes before the damage."""
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    damage, size = "", path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key, ending = f"{folder}/{stem}", ending.lower()
                if f".{ending.rpartition('.')[2]}" in EXTENSIONS:
                    images.append((key, member.name, member.offset_data, member.size))
                elif ending == "cls":
                    content = tar.extractfile(member)
                    labels[key] = int(content.read()) if content else -1
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        damage = f"is damaged: {error}"
    return ShardTable(
        [name for _, name, _, _ in images],
        np.array([offset for _, _, offset, _ in images], dtype=np.int64),
        np.array([size for _, _, _, size in images], dtype=np.int64),
        np.array([labels.get(key, -1) for key, _, _, _ in images], dtype=np.int64),
        damage,
    )


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
