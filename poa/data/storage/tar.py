"""Tar shards in WebDataset layout, read by offset."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from poa.data.storage.base import EXTENSIONS, Opened, Strings
from poa.errors import InputError


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
