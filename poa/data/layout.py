"""Finding images by the name of where they are: kinds of storage, and splits."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from poa.data.storage import Opened, open_parquet, open_shards, read_folder, read_list
from poa.errors import InputError

TRAIN_NAMES = ("train",)
TEST_NAMES = ("val", "validation", "test")
PACKED: dict[str, Callable[[Sequence[Path]], Opened]] = {".tar": open_shards, ".parquet": open_parquet}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Opener = Callable[[], Opened]


def find(name: str) -> tuple[Opener, Opener | None]:
    """How to open the images to train and to test on."""
    root = Path(name)
    if root.is_dir():
        return _find_in_folder(root)
    if root.is_file() and root.suffix == ".txt":
        return lambda: read_list(root), None
    if root.suffix in PACKED:
        paths = _expand(name)
        return lambda: PACKED[root.suffix](paths), None
    raise InputError(
        "data: expected 'digits', a folder of images, a list (.txt), or shards (.tar, .parquet), "
        f"got {name!r}: no such folder or file"
    )


def _find_in_folder(root: Path) -> tuple[Opener, Opener | None]:
    if (root / "train").is_dir():
        test = next((root / t for t in TEST_NAMES if (root / t).is_dir()), None)
        return _folder_opener(root / "train"), _folder_opener(test) if test else None
    packed = _packed_files(root)
    if not packed:
        return lambda: read_folder(root), None
    open_packed = PACKED[packed[0].suffix]
    by_name = {key: [p for p in packed if p.name.startswith(key)] for key in (*TRAIN_NAMES, *TEST_NAMES)}
    test_files = next((by_name[key] for key in TEST_NAMES if by_name[key]), [])
    if by_name["train"] and test_files:
        return lambda: open_packed(by_name["train"]), lambda: open_packed(test_files)
    return lambda: open_packed(packed), None


def _folder_opener(folder: Path) -> Opener:
    packed = _packed_files(folder)
    return (lambda: PACKED[packed[0].suffix](packed)) if packed else (lambda: read_folder(folder))


def _packed_files(folder: Path) -> list[Path]:
    """Shards or tables in a folder, or in its `data/`."""
    for place in (folder, folder / "data"):
        for suffix in PACKED:
            found = sorted(p for p in place.glob(f"*{suffix}") if not p.name.startswith("."))
            if found:
                return found
    return []


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern with `{000..123}`, all of them whether they are there or not, or with `*`."""
    if match := RANGE.search(pattern):
        low, high = match.groups()
        numbers = range(int(low), int(high) + 1)
        return [p for n in numbers for p in _expand(pattern.replace(match[0], f"{n:0{len(low)}}", 1))]
    if not glob.has_magic(pattern):
        return [Path(pattern)]
    found = sorted(glob.glob(pattern))
    if not found:
        raise InputError(f"data: expected files named {pattern}, got none")
    return [Path(p) for p in found]
