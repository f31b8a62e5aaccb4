"""Finding images by the name of where they are: kinds of storage, classes and splits."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from poa.data.storage import (
    Opened,
    Place,
    Url,
    is_url,
    list_urls,
    load_digits,
    open_dataset,
    open_parquet,
    open_shards,
    read_folder,
    read_list,
)
from poa.data.storage.base import EXTENSIONS, TEST_NAMES, TRAIN_NAMES, is_hidden
from poa.data.summary import LeftOut
from poa.errors import InputError

PACKED: dict[str, Callable[[Sequence[Place]], Opened]] = {".tar": open_shards, ".parquet": open_parquet}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_SHARDS = 1_000_000  # of a pattern
DATASET = "dataset:"
"""How the name of what lies in the memory of a Python program begins."""

SOURCES = (
    "digits, or where the images are: a folder, a list (.txt), .tar shards or .parquet tables, also by URL"
)
"""What can be found."""
Images = str | Path | Dataset[Any] | Mapping[str, Dataset[Any]]
"""A path, as `--data` takes it; a map-style dataset; or such datasets by the name of their split."""

Opener = Callable[[], Opened]


@dataclass(frozen=True)
class Openers:
    """How to open the training and the test images (None: no tests); what belongs to neither."""

    train: Opener
    test: Opener | None = None
    left_out: LeftOut = field(default_factory=LeftOut)


def find(name: str) -> Openers:
    """Find images; see `poa.data.sources.open_data`.

    Raises:
        InputError: nothing there.
        OSError: it cannot be looked at.
    """
    root = Path(name)
    kind = root.suffix.lower()
    if name == "digits":
        return Openers(load_digits)
    if is_url(name):
        return _find_remote(name)
    if name.startswith(DATASET):
        raise InputError(
            f"data: expected the dataset {name.removeprefix(DATASET)} as an object, as in "
            "poa.Run(RUN, dataset), got its name; or name other images with --data"
        )
    if name.strip() and root.is_dir():
        return _find_in_folder(root)
    if kind == ".txt" and root.is_file():
        return Openers(lambda: read_list(root))
    if kind in PACKED:
        paths = _expand(name)
        return Openers(lambda: PACKED[kind](paths))
    here = "" if root.is_absolute() else f" in {Path.cwd()}"
    why = "a file of another kind; unpack archives" if root.exists() else f"no such folder or file{here}"
    raise InputError(
        "data: expected 'digits', a folder of images, a list (.txt), or shards (.tar, .parquet), "
        f"got {name!r}: {why}"
    )


def _find_remote(name: str) -> Openers:
    """Shards or tables by their URL, that of a pattern, or that of the folder that they are in."""
    kind = Url(name).suffix.lower()
    if kind in PACKED:
        urls = [url for part in _numbered(name) for url in (list_urls(part) if "*" in part else [Url(part)])]
        if not urls:
            raise InputError(f"data: expected files named {name}, got none")
        return Openers(lambda: PACKED[kind](urls))
    listed = list_urls(name)
    for kind in PACKED:
        if packed := [url for url in listed if url.suffix.lower() == kind]:
            return _split_by_name(packed, LeftOut(), partial(PACKED[kind], packed))
    raise InputError(
        f"data: expected .tar shards or .parquet tables in {name}, got {len(listed)} other files"
    )


def named(data: Images) -> tuple[str, Openers | None]:
    """The name of images, and how to open them, where no name says it."""
    return (str(data), None) if isinstance(data, str | Path) else find_datasets(data)


def find_datasets(data: Any) -> tuple[str, Openers]:
    """A name of a dataset, or of a mapping of its splits, as Hugging Face's; and how to open it. Raises
    InputError: no training images are among the splits."""
    if not isinstance(data, Mapping):
        return f"{DATASET}{type(data).__name__}", Openers(lambda: open_dataset(data))
    trains, tests = ([data[one] for one in _called(names, list(data))] for names in (TRAIN_NAMES, TEST_NAMES))
    if not trains:
        raise InputError(f"data: expected a split called train, got {', '.join(map(str, data)) or 'none'}")
    left_out = LeftOut()
    for name in _called(TEST_NAMES, list(data))[1:]:
        left_out.add("more test splits", name, len(data[name]))
    test = (lambda: open_dataset(tests[0])) if tests else None
    return f"{DATASET}{type(trains[0]).__name__}", Openers(lambda: open_dataset(trains[0]), test, left_out)


def _find_in_folder(root: Path) -> Openers:
    """A folder called train is a split unless it looks like a class; one called val or test always is.

    So are two with the same after these words, such as train2017 and val2017.
    """
    entries = _visible(root)
    folders = [entry.name for entry in entries if entry.is_dir()]
    trains, tests = _called(TRAIN_NAMES, folders), _called(TEST_NAMES, folders)
    if not trains and not tests:
        for ending in (folder[len(word) :] for word in TRAIN_NAMES for folder in folders):
            both = [
                _called([word + ending for word in names], folders) for names in (TRAIN_NAMES, TEST_NAMES)
            ]
            trains, tests = both if all(both) else (trains, tests)
    others = [name for name in folders if name not in (*tests, *trains[:1])]
    left_out = LeftOut()
    for name in tests[1:]:
        left_out.add(f"more test folders next to {tests[0]}/", name)
    test = (lambda: _open_folder(root / tests[0])) if tests else None
    if not trains or (others and not tests and _is_flat(root / trains[0])):
        packed = _packed_files(root)
        if packed and not tests:
            return _split_by_name(packed, left_out, lambda: _open_folder(root))
        return Openers(lambda: _open_folder(root, tests), test, left_out)
    for name in others:
        left_out.add(f"folders next to {trains[0]}/", name)
    for entry in entries:
        if not entry.is_dir() and entry.name.lower().endswith((*EXTENSIONS, *PACKED)):
            left_out.add(f"files next to {trains[0]}/", entry.name)
    return Openers(lambda: _open_folder(root / trains[0]), test, left_out)


def _called(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Folders of these names in upper or lower case, in the order of the names."""
    return [folder for name in names for folder in folders if folder.lower() == name.lower()]


def _is_flat(folder: Path) -> bool:
    """Whether a folder holds just images."""
    entries = _visible(folder)
    images = any(entry.name.lower().endswith(EXTENSIONS) for entry in entries)
    return images and not any(entry.is_dir() for entry in entries)


def _split_by_name(packed: Sequence[Place], left_out: LeftOut, whole: Opener) -> Openers:
    """Shards or tables split by the beginning of their names into training and test images, if they are."""

    def beginning(names: Sequence[str]) -> list[list[Place]]:
        groups = ([p for p in packed if p.name.lower().startswith(name)] for name in names)
        return [group for group in groups if group]

    trains, tests = beginning(TRAIN_NAMES), beginning(TEST_NAMES)
    if not trains or not tests:
        return Openers(whole)
    for path in packed:
        if path not in (*trains[0], *tests[0]):
            left_out.add("shards or tables of other names", path.name)
    open_packed = PACKED[packed[0].suffix.lower()]
    return Openers(lambda: open_packed(trains[0]), lambda: open_packed(tests[0]), left_out)


def _open_folder(folder: Path, skipped: Collection[str] = ()) -> Opened:
    """The images of a folder or its shards, whichever are more; the others are left out."""
    packed = _packed_files(folder)
    if not packed:
        return read_folder(folder, skipped)
    try:
        images = read_folder(folder, skipped)
    except InputError:
        images = None
    if images and packed[0].parent == folder and len(images.images) > 2 * len(packed):
        return images
    opened = PACKED[packed[0].suffix.lower()](packed)
    if images:
        opened.left_out.add("images next to shards or tables", images.images.name(0), len(images.images))
    for entry in _visible(packed[0].parent):
        path = packed[0].with_name(entry.name)
        if path not in packed and not entry.is_dir():
            opened.left_out.add("files other than these shards or tables", entry.name)
    return opened


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not is_hidden(e.name)), key=lambda entry: entry.name)


def _packed_files(folder: Path) -> list[Path]:
    """Shards or tables in a folder, or in its `data/`."""
    for place in (folder, folder / "data"):
        files = _visible(place) if place.is_dir() else []
        for suffix in PACKED:
            names = [f.name for f in files if f.name.lower().endswith(suffix) and not f.is_dir()]
            paths = [place / name for name in names]
            if paths:
                return paths
    return []


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern with `{000..123}`, all of them whether they are there or not, or with `*`.

    A path that is there is taken as it is, whatever its letters mean in a pattern.
    """
    numbered = _numbered(pattern)
    if numbered != [pattern]:
        return [path for part in numbered for path in _expand(part)]
    path = Path(pattern)
    if path.parent.is_dir():
        pattern = os.path.join(glob.escape(str(path.parent)), path.name)
    if path.exists() or not glob.has_magic(path.name if path.parent.is_dir() else pattern):
        return [path]
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise InputError(f"data: expected files named {path}, got none")
    return [Path(p) for p in paths]


def _numbered(pattern: str) -> list[str]:
    """All names that a pattern with `{000..123}` stands for."""
    match = RANGE.search(pattern)
    if not match:
        return [pattern]
    low, high = match.groups()
    numbers = range(int(low), int(high) + 1)
    if not 0 < len(numbers) <= MOST_SHARDS:
        raise InputError(f"data: expected 1 to {MOST_SHARDS:,} shards, got {match[0]} in {pattern}")
    return [name for n in numbers for name in _numbered(pattern.replace(match[0], f"{n:0{len(low)}}", 1))]
