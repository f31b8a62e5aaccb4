"""A file an image: folders and lists."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from poa.data.storage.base import EXTENSIONS, Opened, Strings, is_hidden, is_label, join_labels
from poa.data.summary import HIDDEN, OTHER, LeftOut
from poa.errors import InputError
from poa.files import open_regular

ARRAY = ".npy"  # of NumPy, an image where no pictures are


class Files:
    """A file an image, by paths relative to a folder."""

    def __init__(self, root: Path, paths: Iterable[str]):
        self.root = str(root)
        self.paths = Strings(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def open(self, index: int) -> BinaryIO:
        return open_regular(self.name(index))

    def identity(self) -> Iterable[bytes | np.ndarray]:
        return self.paths.bytes, self.paths.ends


class Tree:
    """The images below a folder; links are followed.

    Attributes:
        images: paths relative to the folder, sorted part by part.
        left_out: hidden files and folders, other files, and what is no file.
        lost: folders that could not be listed.
        folders: how many there are, listed or not.
        top: names of those in the folder itself.
    """

    def __init__(self, root: Path, skipped: Collection[str] = ()):
        self.left_out = LeftOut()
        self.lost: list[str] = []
        self.folders = 0
        self.top: set[str] = set()
        self._root = str(root)
        images: list[str] = []
        rest: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        while rest:
            folder, above = rest.pop()
            self.folders += 1
            try:
                state = os.stat(os.path.join(self._root, folder))
                with os.scandir(os.path.join(self._root, folder)) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError as error:
                self.lost.append(f"{os.path.join(self._root, folder)}: {error.strerror}")
                continue
            above |= {(state.st_dev, state.st_ino)}
            below = []
            for entry in entries:
                path = f"{folder}{os.sep}{entry.name}" if folder else entry.name
                if path not in skipped and self._take(entry, path, above, images):
                    below.append((path, above))
                    self.top |= set() if folder else {path}
            rest += reversed(below)
        pictures = [path for path in images if not path.lower().endswith(ARRAY)]
        if pictures and len(pictures) < len(images):
            array = next(path for path in images if path.lower().endswith(ARRAY))
            self.left_out.add(f"arrays ({ARRAY}) among pictures", array, len(images) - len(pictures))
        self.images = sorted(pictures or images, key=lambda path: path.split(os.sep))
        self.lost.sort()

    def _take(
        self, entry: os.DirEntry[str], path: str, above: Collection[tuple[int, int]], images: list[str]
    ) -> bool:
        """Put an image to the others; return whether the entry is a folder to list."""
        ending = "".join(entry.name.lower().rpartition(".")[1:])
        try:
            if is_hidden(entry.name):
                self.left_out.add(HIDDEN, path)
            elif entry.is_dir():
                state = entry.stat()
                if (state.st_dev, state.st_ino) not in above:
                    return True
                self.left_out.add("links to a folder around them", path)
            elif ending in (*EXTENSIONS, ARRAY):
                if entry.is_file() or entry.is_symlink():  # a link to nothing is an unreadable image
                    images.append(path)
                else:
                    self.left_out.add("not regular files", path)
            elif entry.is_symlink() and not entry.is_file():
                self.lost.append(f"{os.path.join(self._root, path)}: a link to nothing")
            else:
                self.left_out.add(OTHER, path)
        except OSError as error:  # behind a link
            self.lost.append(f"{os.path.join(self._root, path)}: {error.strerror}")
        return False


def read_folder(root: Path, skipped: Collection[str] = ()) -> Opened:
    """List a folder of class folders, or a flat folder of images; sorted, hidden files and names `skipped`
    left out.

    Images beside class folders have no label. Raises InputError: no images there.
    """
    tree = Tree(root, skipped)
    if not tree.images:
        why = "; ".join([f"left out: {tree.left_out}"] * bool(tree.left_out) + tree.lost)
        raise InputError(
            f"data: expected images (.jpg, .png, .webp, ...) in {root}, got none{why and f' ({why})'}"
        )
    parents = [path.partition(os.sep)[0] if os.sep in path else "" for path in tree.images]
    classes = tuple(sorted({*parents} - {""}))
    number = {"": -1, **{name: i for i, name in enumerate(classes)}}
    labels = np.array([number[parent] for parent in parents], dtype=np.int64) if classes else None
    for folder in sorted(tree.top - set(classes)):
        tree.left_out.add("folders without images", folder)
    lost = tuple(tree.lost)
    return Opened(
        Files(root, tree.images), labels, classes, "class folders", tree.left_out, lost, tree.folders
    )


def read_list(file: Path) -> Opened:
    """A path a line, relative to the list's folder, with a label after a tab or without."""
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    rows = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
    if not rows:
        raise InputError(f"data: expected a path in every line of {file}, got an empty list")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or lengths - {1, 2}:
        raise InputError(f"data: expected PATH or PATH<tab>LABEL in every line of {file}, got a mixture")
    images = Files(file.parent, (row[0] for row in rows))
    if lengths == {1}:
        return Opened(images, None, ())
    names, codes = np.unique([row[1] for row in rows], return_inverse=True)
    own = [str(name) for name in names]
    return Opened(images, *join_labels([(codes, own)], list(filter(is_label, own))), "the list")
