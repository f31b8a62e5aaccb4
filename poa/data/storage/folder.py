"""A file an image: folders and lists."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from poa.data.storage.base import EXTENSIONS, Opened, Strings
from poa.errors import InputError


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


def read_folder(root: Path) -> Opened:
    """List a folder of class folders, or a flat folder of images; sorted, hidden files left out."""
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = {name: _images_below(root / name) for name in classes}
    classes = [name for name in classes if files[name]]
    if classes:
        paths = [path for name in classes for path in files[name]]
        labels = np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes])
        return Opened(Files(paths), labels, tuple(classes))
    flat = _images_below(root)
    if not flat:
        raise InputError(f"data: expected images ({' '.join(EXTENSIONS)}) in {root}, got none")
    return Opened(Files(flat), None, ())


def read_list(file: Path) -> Opened:
    """A path a line, relative to the list's folder, with a label after a tab or without."""
    lines = [line.rstrip("\r") for line in file.read_text(encoding="utf-8").split("\n")]
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows:
        raise InputError(f"data: expected a path in every line of {file}, got an empty list")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or lengths - {1, 2}:
        raise InputError(f"data: expected PATH or PATH<tab>LABEL in every line of {file}, got a mixture")
    images = Files(file.parent / row[0] for row in rows)
    if lengths == {1}:
        return Opened(images, None, ())
    classes, labels = np.unique([row[1] for row in rows], return_inverse=True)
    return Opened(images, labels.astype(np.int64), tuple(str(c) for c in classes))


def _images_below(folder: Path) -> list[str]:
    found = [
        os.path.join(directory, file)
        for directory, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
    ]
    return sorted(found, key=lambda path: path.split(os.sep))
