"""Tar shards in WebDataset layout, read by offset."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from poa.data.storage.base import (
    EXTENSIONS,
    NO_PHOTO,
    TEST_NAMES,
    TRAIN_NAMES,
    Opened,
    Strings,
    is_hidden,
    join_labels,
)
from poa.data.storage.remote import Place, cache_folder, open_place, version
from poa.data.summary import HIDDEN, OTHER, LeftOut
from poa.errors import DataError, InputError
from poa.files import write_bytes

BLOCK = tarfile.BLOCKSIZE
LONGEST_LABEL = 256  # bytes of a `.cls` member
LARGEST_IMAGE = 1 << 30  # bytes
# What compressed files begin with.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
TABLES = 2  # version of the tables in the cache


class Shards:
    """Images in uncompressed tar files, read by offset."""

    def __init__(self, paths: Sequence[Place], tables: Sequence[ShardTable]):
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
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if size > LARGEST_IMAGE:
            raise ValueError(f"{size:,} bytes are not an image")
        with open_place(self.paths[self.shard[index]]) as file:
            file.seek(offset - BLOCK)
            content = file.read(BLOCK + size)
        header = _header(content[:BLOCK])
        if header is None or header.size != size or len(content) != BLOCK + size:
            raise ValueError("the shard is not what it was when it was listed")
        return io.BytesIO(content[BLOCK:])

    def identity(self) -> Iterable[bytes | np.ndarray]:
        return self.names.bytes, self.names.ends, self.shard, self.offsets, self.sizes


@dataclass(frozen=True)
class ShardTable:
    """The images of one tar file.

    Attributes:
        names: of the members.
        offsets, sizes: int64, bytes.
        labels: int64, which of `classes`; -1 where a sample has none.
        classes: names of the labels.
        left_out: other members, by reason.
        damage: what is wrong with the file, if anything; the table holds what is whole.
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: list[str]
    left_out: LeftOut = field(default_factory=LeftOut)
    damage: str = ""

    def only(self, wanted: Sequence[bool]) -> ShardTable:
        """Those of its images that are wanted."""
        at = np.flatnonzero(wanted)
        names, places = [self.names[i] for i in at], (self.offsets[at], self.sizes[at], self.labels[at])
        return ShardTable(names, *places, self.classes)


def open_shards(paths: Sequence[Place]) -> Opened:
    """Tar files in WebDataset layout: `KEY.jpg` and, with a label, `KEY.cls` beside it, a number or a name.

    Without any label, class folders inside (`cat/1.jpg`), below the folders that all members have in common,
    are labels; where such folders are called train and val or test, they are splits. A file is listed once;
    the table is kept in the user's cache folder and made again when the file changes.
    """
    whole, tables, lost, left_out = [], [], [], LeftOut()
    for path in paths:
        try:
            table = _cached_table(path)
        except DataError:
            raise
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            lost.append(f"{path} is missing" if missing else f"{path}: {error.strerror or error}")
            continue
        if table.damage:
            lost.append(f"{path}: {table.damage}; {len(table.names)} images are whole")
        left_out.update_from(table.left_out)
        whole.append(path)
        tables.append(table)
    if not any(table.names for table in tables):
        why = [*lost[:1], *([f"left out: {left_out}"] if left_out else [])]
        raise InputError(
            f"data: expected tar files with images, got none in {len(paths)} files from {paths[0]} on"
            + (f" ({'; '.join(why)})" if why else "")
        )
    folders = _folders(tables)
    present = {name.lower(): name for each in folders for name in each}
    splits = [next((present[n] for n in names if n in present), None) for names in (TRAIN_NAMES, TEST_NAMES)]
    about = left_out, tuple(lost), len(paths)
    if None in splits:
        return _opened(whole, tables, *about)
    for each in folders:
        for name in each:
            if name not in splits:
                left_out.add(f"members next to {splits[0]}/", name)
    train, test = (
        [table.only([name == split for name in each]) for table, each in zip(tables, folders, strict=True)]
        for split in splits
    )
    return replace(_opened(whole, train, *about), test=_opened(whole, test, LeftOut(), (), 0))


def _opened(
    paths: Sequence[Place],
    tables: Sequence[ShardTable],
    left_out: LeftOut,
    lost: tuple[str, ...],
    parts: int,
) -> Opened:
    labels, classes = join_labels([(table.labels, table.classes) for table in tables])
    labels_from = ".cls members"
    if labels is None:
        labels, classes = _of_class_folders(tables)
        labels_from = "class folders"
    return Opened(Shards(paths, tables), labels, classes, labels_from, left_out, lost, parts)


def _folders(tables: Sequence[ShardTable]) -> list[list[str]]:
    """Of each member the folder that it lies in, below those that all have in common; empty for none."""
    folders = [[name.split("/")[:-1] for name in table.names] for table in tables]
    common = len(os.path.commonprefix([path for paths in folders for path in paths]))
    return [[path[common] if len(path) > common else "" for path in paths] for paths in folders]


def _of_class_folders(tables: Sequence[ShardTable]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """As `join_labels`, by the folders that members lie in; none where these are splits."""
    names = _folders(tables)
    if {name.lower() for each in names for name in each} & {*TRAIN_NAMES, *TEST_NAMES}:
        return None, ()
    parts = [np.unique(each, return_inverse=True) for each in names]
    return join_labels([(codes.astype(np.int64), [str(name) for name in own]) for own, codes in parts])


def _cached_table(path: Place) -> ShardTable:
    key, folder = f"{TABLES} {version(path)}", cache_folder()
    if folder is None:
        return list_shard(path)
    file = folder / "shards" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    try:
        return _read_table(file)
    except Exception:  # missing, or of any content
        table = list_shard(path)
    about = json.dumps([table.names, table.classes, table.left_out, table.damage])
    text = np.frombuffer(about.encode(), dtype=np.uint8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, text=text, offsets=table.offsets, sizes=table.sizes, labels=table.labels)
        write_bytes(file, content.getvalue())
    except OSError:
        pass  # a cache is a convenience
    return table


def _read_table(file: Path) -> ShardTable:
    with np.load(file) as kept:
        names, classes, left_out, damage = json.loads(kept["text"].tobytes())
        offsets, sizes, labels = (kept[key] for key in ("offsets", "sizes", "labels"))
    if {len(offsets), len(sizes), len(labels)} != {len(names)}:
        raise ValueError("the table is damaged")
    return ShardTable(names, offsets, sizes, labels, classes, LeftOut(left_out), damage)


def list_shard(path: Place) -> ShardTable:
    """List a tar file. After a damaged header it continues at the next intact one."""
    with open_place(path) as file:
        if file.read(8).startswith(COMPRESSED):
            raise OSError("is compressed, expected a plain tar file")
        walk = _Walk(file, file.seek(0, os.SEEK_END))
        listing = _Listing(file)
        for member in walk.members():
            listing.take(member)
    return listing.table(walk.damage)


class _Walk:
    """The members of a tar file, past what is damaged in it.

    Attributes:
        damage: what is damaged, once all members were seen.
    """

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.damage = ""
        self._places: list[int] = []
        self._lost = 0

    def members(self) -> Iterator[tarfile.TarInfo]:
        start: int | None = 0
        while start is not None:
            end = yield from self._archive(start)
            start = self._after(start, end)
        if self._places:
            cut = self._places[-1] >= self.size
            self.damage = f"is damaged at byte {self._places[0]:,}" + " (it may be cut off)" * cut
            self.damage += f", {len(self._places)} places in all" * (len(self._places) > 1)
            self.damage += f": {self._lost:,} bytes are lost" * bool(self._lost)

    def _archive(self, start: int) -> Generator[tarfile.TarInfo, None, int]:
        """Members from here on to the end or the next damage; return where that is."""
        self.file.seek(start)
        archive = None
        try:
            archive = tarfile.TarFile(fileobj=self.file)
            while member := archive.next():
                if member.offset_data + member.size > self.size:
                    return member.offset  # cut off
                yield member
        except DataError:
            raise
        except Exception:  # what is damaged raises whatever it likes
            pass
        return max(archive.offset, start) if archive else start

    def _after(self, start: int, end: int) -> int | None:
        """Where to continue after damage, or None; note what is lost."""
        self.file.seek(end)
        block = self.file.read(BLOCK)
        if len(block) == BLOCK and not block.strip(b"\0"):
            following = self._next_content(end)
            if following is None:
                return None
            self.file.seek(following)
            if (following - start) % tarfile.RECORDSIZE == 0 and _header(self.file.read(BLOCK)):
                return following  # archives put one behind the other
        self._places.append(end)
        following = self._next_header(end + BLOCK)
        self._lost += max((self.size if following is None else following) - end, 0)
        return following

    def _chunks(self, start: int) -> Iterator[tuple[int, bytes]]:
        self.file.seek(start)
        while chunk := self.file.read(2048 * BLOCK):
            yield start, chunk
            start += len(chunk)

    def _next_content(self, start: int) -> int | None:
        """The first block that is not zero."""
        for offset, chunk in self._chunks(start):
            at = len(chunk) - len(chunk.lstrip(b"\0"))
            if at < len(chunk):
                return offset + at // BLOCK * BLOCK
        return None

    def _next_header(self, start: int) -> int | None:
        for offset, chunk in self._chunks(start):
            magic = chunk.find(b"ustar")
            while magic >= 0:
                at = magic - 257
                if at >= 0 and at % BLOCK == 0 and _header(chunk[at : at + BLOCK]):
                    return offset + at
                magic = chunk.find(b"ustar", magic + 1)
        return None


def _header(block: bytes) -> tarfile.TarInfo | None:
    """A header, if its checksum is right."""
    try:
        return tarfile.TarInfo.frombuf(block, tarfile.ENCODING or "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


class _Picture(NamedTuple):
    """A member with an ending of images; `parts` are all of its endings."""

    key: str
    parts: list[str]
    name: str
    offset: int
    size: int


class _Listing:
    """Pictures and labels among the members of a tar file."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left_out = LeftOut()
        self.pictures: list[_Picture] = []
        self.labels: dict[str, str] = {}
        self.places: dict[str, tuple[int, int]] = {}

    def take(self, member: tarfile.TarInfo) -> None:
        """Look at a member."""
        name = member.name
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, parts = f"{folder}/{stem}", ending.lower().split(".")
        picture = f".{parts[-1]}" in EXTENSIONS
        if member.isdir():
            return
        if any(is_hidden(part) for part in name.split("/") if part not in (".", "..")):
            self.left_out.add(HIDDEN, name)
        elif member.islnk() and picture and member.linkname in self.places:
            self.pictures.append(_Picture(key, parts, name, *self.places[member.linkname]))
        elif not member.isreg() or member.issparse():
            self.left_out.add("links and the like", name)
        elif picture:
            self.places[name] = member.offset_data, member.size
            self.pictures.append(_Picture(key, parts, name, *self.places[name]))
        elif parts == ["cls"]:
            self._label(key, member)
        else:
            self.left_out.add(OTHER, name)

    def _label(self, key: str, member: tarfile.TarInfo) -> None:
        self.file.seek(member.offset_data)
        text = self.file.read(min(member.size, LONGEST_LABEL + 1)).decode("utf-8", "replace").strip()
        if len(text) > LONGEST_LABEL:
            self.left_out.add("labels that are too long", member.name)
        else:
            self.labels[key] = str(int(text)) if text.isdecimal() else text

    def table(self, damage: str) -> ShardTable:
        """All that was listed, with one picture of each sample."""
        pictures = self._photos()
        names, codes = np.unique([self.labels.get(p.key, "") for p in pictures], return_inverse=True)
        return ShardTable(
            names=[p.name for p in pictures],
            offsets=np.array([p.offset for p in pictures], dtype=np.int64),
            sizes=np.array([p.size for p in pictures], dtype=np.int64),
            labels=codes.astype(np.int64),
            classes=[str(name) for name in names],
            left_out=self.left_out,
            damage=damage,
        )

    def _photos(self) -> list[_Picture]:
        """Of a sample with `KEY.jpg` that picture; of others all that are no masks, if there are such."""
        samples: dict[str, list[_Picture]] = {}
        for picture in self.pictures:
            samples.setdefault(picture.key, []).append(picture)
        chosen: set[int] = set()
        for sample in samples.values():
            plain = [p for p in sample if len(p.parts) == 1]
            best = sorted(plain, key=lambda p: EXTENSIONS.index(f".{p.parts[0]}"))[:1]
            photos = best or [p for p in sample if not any(map(NO_PHOTO.search, p.parts))] or sample
            chosen |= {id(p) for p in photos}
        for picture in self.pictures:
            if id(picture) not in chosen:
                self.left_out.add("further pictures of a sample", picture.name)
        return [p for p in self.pictures if id(p) in chosen]
