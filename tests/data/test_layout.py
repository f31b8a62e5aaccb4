"""What is taken of a folder, as which class, and what is said about the rest."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_collections import cache

from helpers import collections_of_images as collections
from helpers import processes
from helpers.run_folders import rows
from helpers.tiny import tiny_config
from poa.data.decode import FORMATS
from poa.data.sources import DataSplit, open_data
from poa.data.storage import EXTENSIONS
from poa.errors import InputError
from poa.train import pretrain

__all__ = ["cache"]  # a fixture

Layout = dict[str, int | str]


def lay_out(root: Path, folders: dict[str, int], *files: str) -> Path:
    """Folders with so many images, and files: images, or text where they have no ending of images."""
    names = [f"{folder}/{i}.png" for folder, count in folders.items() for i in range(count)]
    for number, name in enumerate([*names, *files]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(collections.encoded(number))
    return root


def counts(data: DataSplit) -> tuple[int, int | None]:
    return len(data.train), data.test and len(data.test)


def opened(root: Path, holdout: float = 0.25) -> tuple[int, int | None, tuple[str, ...], str]:
    data = open_data(str(root), holdout, 0)
    return *counts(data), data.train.classes, str(data.left_out)


@pytest.mark.parametrize(
    ("folders", "files", "expected"),
    [
        ({"car": 8, "cat": 8, "train": 8}, [], (18, 6, ("car", "cat", "train"), "")),
        (
            {"train/a": 4, "train/b": 4, "car": 3},
            ["x.png"],
            (6, 2, ("a", "b"), "1 folders next to train/ (car); 1 files next to train/ (x.png)"),
        ),
        ({"Train/a": 4, "Train/b": 4, "VAL/a": 2, "VAL/b": 1}, [], (8, 3, ("a", "b"), "")),
        (
            {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 1, "test": 3},
            [],
            (8, 3, ("a", "b"), "1 more test folders next to val/ (test)"),
        ),
        (
            {"train2017/a": 4, "train2017/b": 4, "val2017/a": 2, "val2017/b": 1, "notes": 1},
            [],
            (8, 3, ("a", "b"), "1 folders next to train2017/ (notes)"),
        ),
        ({"train_cat": 4, "val_dog": 4}, [], (6, 2, ("train_cat", "val_dog"), "")),
        ({"a": 4, "b": 4, "test/a": 2}, [], (8, 2, ("a", "b"), "")),
        ({".": 30, "extra": 3}, [], (33, None, (), "")),
        ({".": 3, "a": 4, "b": 4}, [], (9, 2, ("a", "b"), "")),
        ({"all": 20}, [], (20, None, (), "")),
        ({f"{i}": 1 for i in range(9)}, [], (9, None, tuple("012345678"), "")),
        (
            {"a": 2, "b": 4, "b/.thumbs": 2, "b/@eaDir": 2, "__MACOSX/a": 2},
            ["a/._0.png", "notes.md", "a/x.heic"],
            (
                *(4, 2, ("a", "b")),
                "4 hidden or of the system (__MACOSX, a/._0.png, b/.thumbs, ...); "
                "2 without an ending of images (notes.md, a/x.heic)",
            ),
        ),
        ({"a": 8, "b": 8}, ["old.tar", "b/old.parquet"], None),
    ],
    ids=lambda value: str(list(value))[:30] if isinstance(value, dict) else "",
)
def test_layouts(
    folders: dict[str, int], files: list[str], expected: tuple[object, ...] | None, tmp_path: Path
) -> None:
    actual = opened(lay_out(tmp_path / "data", folders, *files))
    expected = expected or (12, 4, ("a", "b"), "2 without an ending of images (old.tar, b/old.parquet)")
    assert (*actual[:3], set(actual[3].split("; "))) == (*expected[:3], set(str(expected[3]).split("; ")))


@pytest.mark.parametrize("name", ["images.tar.gz", "images.zip", "0.png", "list.csv"])
def test_files_of_another_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"got '.*{name}': a file of another kind; unpack archives"):
        open_data(str(tmp_path / name), 0.0, 0)


def test_endings_in_capitals(tmp_path: Path) -> None:
    shard = collections.write_shards(tmp_path, 6) / "part-0000.tar"
    shard.rename(tmp_path / "PART.TAR")
    for name in (tmp_path, tmp_path / "PART.TAR"):
        assert len(open_data(str(name), 0.0, 0).train) == 6


def test_a_flat_folder_to_test_on(tmp_path: Path) -> None:
    data = open_data(str(lay_out(tmp_path, {"train/a": 4, "train/b": 4, "val": 6})), 0.25, 0)
    assert counts(data) == (8, None) and data.untested == "the test images have no labels"
    assert str(data.left_out) == f"6 test images, unused ({tmp_path}/val/0.png, ...)"


def test_only_a_folder_to_test_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected images .* got none"):
        open_data(str(lay_out(tmp_path, {"val/a": 4, "val/b": 4})), 0.25, 0)


def test_all_images_are_kept_where_nothing_is_to_be_held_out(tmp_path: Path) -> None:
    data = open_data(str(lay_out(tmp_path, {"a": 4, "b": 1})), 0.0, 0)
    assert counts(data) == (5, None) and data.untested == "data.holdout=0"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    lay_out(tmp_path / "disk", {"owl": 3})
    root = lay_out(tmp_path / "data", {"cat": 4})
    (root / "cat" / "again").symlink_to(root)
    (root / "cat" / "x.png").symlink_to(tmp_path / "nowhere.png")
    (root / "owl").symlink_to(tmp_path / "disk" / "owl")
    os.mkfifo(root / "owl" / "fifo.png")
    data = open_data(str(root), 0.0, 0)
    assert np.bincount(data.train.labels).tolist() == [5, 3]  # what is behind the broken link is unreadable
    assert str(data.left_out) == (
        "1 links to a folder around them (cat/again); 1 not regular files (owl/fifo.png)"
    )


def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lay_out(tmp_path, {"cat": 4, "dog": 4, "owl/part": 4})
    (root / "emu").symlink_to(tmp_path / "nowhere")
    whole = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith(("dog", "part")):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(InputError, match=r"got 3 of 5 missing .*dog: Input/output.*emu: a link to nothing"):
        open_data(str(root), 0.0, 0, lost_share=0.5)
    data = open_data(str(root), 0.0, 0, lost_share=0.6)
    assert len(data.train) == 4 and len(data.lost) == 3
    monkeypatch.setattr(os, "scandir", lambda path: failing("dog"))
    with pytest.raises(InputError, match="expected images that can be read in .* got: .*Input/output error"):
        open_data(str(root), 0.0, 0)


def test_endings_are_those_of_the_formats_that_are_decoded() -> None:
    from PIL import Image

    known = Image.registered_extensions()
    assert {known[ending] for ending in EXTENSIONS if ending in known} <= {*FORMATS, "MPO"}
    ours = {ending for ending, kind in known.items() if kind in FORMATS and Image.OPEN.get(kind)}
    assert ours <= set(EXTENSIONS)


WRITERS: dict[str, Callable[[Path, int], Path]] = collections.WRITERS


@pytest.mark.parametrize("kind", list(WRITERS))
def test_ranks_compare_what_they_see(kind: str, tmp_path: Path) -> None:
    """The same images in another folder are the same; one image less, renamed or relabelled is not."""
    mine, theirs = (open_data(str(WRITERS[kind](tmp_path / name, 30)), 0.25, 0) for name in "ab")
    fewer = open_data(str(WRITERS[kind](tmp_path / "c", 27)), 0.25, 0)
    other_seed = open_data(str(WRITERS[kind](tmp_path / "b", 30)), 0.25, 1)
    assert mine.digest() == theirs.digest()
    assert len({mine.digest(), fewer.digest(), other_seed.digest()}) == 3
    if kind == "folder":
        path = tmp_path / "b" / "cat" / "0000.png"
        path.rename(path.with_name("00000.png"))
        assert open_data(str(tmp_path / "b"), 0.25, 0).digest() != mine.digest()


RANK = """
import os, sys
from poa.__main__ import main
sys.exit(main(["pretrain", "--check", "--device=cpu", f"--data={sys.argv[1]}/{os.environ['RANK']}"]))
"""


def test_ranks_that_see_other_images_do_not_begin(tmp_path: Path) -> None:
    for rank in "01":
        lay_out(tmp_path / rank, {"cat": 4, "dog": 4})
    (tmp_path / "1" / "dog" / "3.png").rename(tmp_path / "1" / "dog" / "4.png")
    for code, _, error in processes.finish(processes.start(2, "-c", RANK, str(tmp_path))):
        assert code == 2 and "data: expected the same on all ranks, got checksum of names" in error


def test_a_run_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = lay_out(tmp_path / "data", {".": 2, "cat": 8, "dog": 8, "dog/.x": 1}, "notes.txt", "odd\udcff.x")
    pretrain(tiny_config(f"data.source={root}", "run.evaluate_every=6"), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        f"data: 14 images of {root} to train on in 2 classes (cat, dog), labels from class folders, "
        "2 images without one; 4 held out for k-NN"
    )
    assert set(lines[2].removeprefix("left out: ").split("; ")) == {
        "1 hidden or of the system (dog/.x)",
        r"2 without an ending of images (notes.txt, odd\udcff.x)",
    }
    assert any("knn" in row for row in rows(tmp_path / "run"))


@pytest.mark.parametrize("name", ["part-0000.tar", "part-{0000..0001}.tar", "part-000[01].tar", "*.tar"])
def test_brackets_in_the_name_of_a_folder(name: str, tmp_path: Path) -> None:
    root = collections.write_shards(tmp_path / "set [v2]", 12)
    assert len(open_data(str(root / name), 0.0, 0).train) == (8 if name == "part-0000.tar" else 12)


@pytest.mark.parametrize(
    "name", ["", " ", "x\0y", "part-{9..0}.tar", "{0..99999999}.tar", "n" * 300, "*.tar"]
)
def test_names_of_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^data: expected"):
        open_data(name, 0.25, 0)
