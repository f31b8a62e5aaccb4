"""Tar shards and Parquet tables: which members and columns are pictures and labels; damage is counted."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_collections import cache

from helpers import collections_of_images as collections
from helpers.collections_of_images import add, encoded
from poa.data.decode import ImageError
from poa.data.sources import DataSplit, open_data
from poa.data.storage import list_shard
from poa.data.storage.tar import Shards
from poa.errors import InputError

__all__ = ["cache"]  # a fixture

MUTATIONS = int(os.environ.get("POA_MUTATIONS", "12"))


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def table(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
    content = pa.table(columns).replace_schema_metadata(about)
    pyarrow.parquet.write_table(content, path, row_group_size=4)
    return path


def photos(count: int) -> list[dict[str, bytes]]:
    return [{"bytes": encoded(i)} for i in range(count)]


def grey() -> bytes:
    file = io.BytesIO()
    Image.new("L", (32, 32)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("endings", "kept"),
    [
        (["jpg", "seg.png", "depth.png"], ["jpg"]),
        (["png", "jpg"], ["jpg"]),
        (["image.png", "seg_mask.png"], ["image.png"]),
        (["left.png", "right.png"], ["left.png", "right.png"]),
        (["2020.jpg"], ["2020.jpg"]),
        (["mask.png"], ["mask.png"]),
        (["JFIF", "txt"], ["JFIF"]),
    ],
    ids=str,
)
def test_pictures_of_a_sample(endings: list[str], kept: list[str], tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", {f"a/7.{ending}": encoded(1) for ending in endings})
    listing = list_shard(path)
    assert listing.names == [f"a/7.{ending}" for ending in kept]
    assert sum(count for count, _ in listing.left_out.values()) == len(endings) - len(kept)


def test_hidden_and_linked_members(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("./a.png", "._a.png", "__MACOSX/a.png", ".x/b.png"):
            add(tar, name, encoded(3))
        for name, kind, target in (
            ("b.png", tarfile.LNKTYPE, "./a.png"),
            ("c.png", tarfile.SYMTYPE, "a.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    source = open_data(str(path), 0.25, 0).train
    assert [source.storage.name(i).partition(":")[2] for i in range(2)] == ["./a.png", "b.png"]
    assert np.array_equal(source.read(0, 32), source.read(1, 32))
    assert str(list_shard(path).left_out) == (
        "3 hidden or of the system (._a.png, __MACOSX/a.png, .x/b.png); 1 links and the like (c.png)"
    )


@pytest.mark.parametrize(
    ("texts", "labels", "classes"),
    [
        (["cat", "dog\n", "cat"], [0, 1, 0], ("cat", "dog")),
        (["10", "9", "010"], [1, 0, 1], ("9", "10")),
        (["3", "-1", "4"], [0, -1, 1], ("3", "4")),
        (["1", "", "2"], [0, -1, 1], ("1", "2")),
        (["1", "10000000000", "2"], [0, 2, 1], ("1", "2", "10000000000")),
        (["a", "x" * 999, "b"], [0, -1, 1], ("a", "b")),
        (["-1", "-1", "-1"], None, ()),
        (["7", "7", "7"], None, ()),
    ],
    ids=lambda value: str(value)[:20],
)
def test_labels_of_shards(
    texts: list[str], labels: list[int] | None, classes: tuple[str, ...], tmp_path: Path
) -> None:
    members = {f"{i}.{kind}": b"" for i in range(3) for kind in ("png", "cls")}
    for i, text in enumerate(texts):
        members |= {f"{i}.png": encoded(i), f"{i}.cls": text.encode()}
    train = open_data(str(shard(tmp_path / "x.tar", members)), 0.0, 0).train
    assert train.classes == classes
    assert (None if train.labels is None else train.labels.tolist()) == labels


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        ([["x/y/cat/0", "x/y/cat/1"], ["x/y/dog/2", "x/y/dog/deep/3"]], [0, 0, 1, 1], "cat dog"),
        ([["./2/0", "./10/1", "./3"]], [0, 1, -1], "2 10"),
        ([["a/0", "a/1"]], None, ""),
        ([["train/cat/0", "train/dog/1", "cat/2"]], None, ""),
    ],
)  # fmt: skip
def test_class_folders_in_shards(
    names: list[list[str]], labels: list[int] | None, classes: str, tmp_path: Path
) -> None:
    for number, members in enumerate(names):
        shard(tmp_path / f"{number}.tar", {f"{name}.png": encoded(1) for name in members})
    data = open_data(str(tmp_path), 0.0, 0)
    assert data.train.classes == tuple(classes.split())
    assert (None if data.train.labels is None else data.train.labels.tolist()) == labels
    assert data.labels_from == ("class folders" if labels else "")


def test_splits_inside_of_shards(tmp_path: Path) -> None:
    for number, members in enumerate(
        (["d/Train/cat/0", "d/val/dog/1", "d/val/cat/5"], ["d/Train/dog/2", "d/x/3", "d/test/4"])
    ):
        shard(tmp_path / f"{number}.tar", {f"{name}.png": encoded(1) for name in members})
    data = open_data(str(tmp_path), 0.25, 0)
    assert data.test is not None and data.train.classes == data.test.classes == ("cat", "dog")
    assert [data.train.name(i).rpartition(":")[2] for i in range(2)] == [
        "d/Train/cat/0.png",
        "d/Train/dog/2.png",
    ]
    assert data.test.label(0) == "dog" and (len(data.train), len(data.test)) == (2, 2)
    assert data.test.read(0, 32).shape == data.train.read(1, 32).shape
    assert str(data.left_out) == "2 members next to Train/ (x, test)"


def test_numbered_classes_that_one_side_lacks(tmp_path: Path) -> None:
    for part, numbers in (("train", "0013"), ("val", "123")):
        members = {f"{i}.cls": label.encode() for i, label in enumerate(numbers)}
        shard(tmp_path / f"{part}-0.tar", members | {f"{i}.png": encoded(i) for i in range(len(numbers))})
    data = open_data(str(tmp_path), 0.25, 0)
    assert data.train.classes == ("0", "1", "3", "2") and data.train.labels.tolist() == [0, 0, 1, 2]
    assert data.test is not None and data.test.labels.tolist() == [1, 3, 2]


def test_archives_one_behind_the_other_are_whole(tmp_path: Path) -> None:
    paths = [shard(tmp_path / name, {f"{name}{i}.png": encoded(i) for i in range(9)}) for name in "ab"]
    (tmp_path / "both.tar").write_bytes(b"".join(path.read_bytes() for path in paths))
    listing = list_shard(tmp_path / "both.tar")
    assert len(listing.names) == 18 and listing.damage == ""


def test_a_shard_that_changed_is_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where size and time are as before; and what changed since it was listed is not read."""
    path = shard(tmp_path / "x.tar", {f"{i}.png": encoded(i) for i in range(3)})
    before, data = path.stat(), open_data(str(path), 0.0, 0)
    shard(path, {f"{i}.png": encoded(i + 1) for i in range(3)})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ImageError, match="not what it was when it was listed"):
        data.train.read(1, 32)
    again = open_data(str(path), 0.0, 0)
    assert [again.train.read(i, 64).shape[0] for i in range(3)] == [31, 32, 33]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(open_data(str(path), 0.0, 0).train) == 3 and not Path("relative").exists()


IMAGE = {"_type": "Image"}


@pytest.mark.parametrize(
    ("columns", "features", "right"),
    [
        (["annotation", "image"], {"annotation": IMAGE, "image": IMAGE}, "image"),
        (["audio", "clip"], {"audio": {"_type": "Audio"}, "clip": IMAGE}, "clip"),
        (["seg_mask", "frame"], None, "frame"),
        (["bytes"], None, "bytes"),
        (["left", "right"], None, None),
    ],
    ids=str,
)
def test_columns_of_pictures(
    columns: list[str], features: dict[str, Any] | None, right: str | None, tmp_path: Path
) -> None:
    content = {name: photos(6) if name == right else [{"bytes": grey()}] * 6 for name in columns}
    path = table(tmp_path / "x.parquet", content, features)
    if right is None:
        with pytest.raises(InputError, match="one only or one named image, got left, right"):
            open_data(str(path), 0.25, 0)
        return
    data = open_data(str(path), 0.25, 0)
    assert data.train.read(0, 32).std() > 0
    assert sum(count for count, _ in data.left_out.values()) == len(columns) - 1


NAMES = {"names": ["ox", "ant"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("column", "values", "names", "labels", "classes"),
    [
        ("label", [0, 1, None, -1], NAMES, [0, 1, -1, -1], ("ox", "ant")),
        ("kind", [1, 0, 1, 1], NAMES, [1, 0, 1, 1], ("ox", "ant")),
        ("label", [5, 10**10, 5, 7], None, [0, 2, 0, 1], ("5", "7", "10000000000")),
        ("label", [0.0, 2.0, float("nan"), None], None, [0, 1, -1, -1], ("0", "2")),
        ("label", ["b", "a", None, ""], None, [1, 0, -1, -1], ("a", "b")),
        ("label", [None, -1, -1, None], NAMES, None, ()),
        ("label", [True, False, None, True], None, [1, 0, -1, 1], ("False", "True")),
        ("other", [1, 2, 3, 4], None, None, ()),
        ("label", [[1], [2], [1, 2], []], None, None, ()),
    ],
    ids=lambda value: str(value)[:24],
)
def test_labels_of_tables(
    column: str,
    values: list[Any],
    names: dict[str, Any] | None,
    labels: list[int] | None,
    classes: tuple[str, ...],
    tmp_path: Path,
) -> None:
    content = {"image": photos(4), column: values}
    path = table(tmp_path / "x.parquet", content, names and {column: names, "image": IMAGE})
    data = open_data(str(path), 0.0, 0)
    assert data.train.classes == classes and data.labels_from == (f"column {column!r}" if classes else "")
    assert (None if data.train.labels is None else data.train.labels.tolist()) == labels
    several = "1 columns of labels that are no single values (x.parquet: label)"
    assert str(data.left_out) == several * isinstance(values[0], list)


def test_labels_without_a_name(tmp_path: Path) -> None:
    features = {"label": NAMES, "image": IMAGE}
    path = table(tmp_path / "x.parquet", {"image": photos(3), "label": [0, 1, 2]}, features)
    with pytest.raises(InputError, match="expected labels below 2 in column 'label' .*, got 2"):
        open_data(str(path), 0.0, 0)


def test_images_to_test_on_without_labels(tmp_path: Path) -> None:
    """Those without a label are no queries; where none has one, there are no tests."""
    features = {"label": NAMES, "image": IMAGE}
    table(tmp_path / "train-0.parquet", {"image": photos(8), "label": [0, 1] * 4}, features)
    for values, tested in (([-1, 1, None], 1), ([-1, -1, -1], None)):
        table(tmp_path / "test-0.parquet", {"image": photos(3), "label": values}, features)
        data = open_data(str(tmp_path), 0.25, 0)
        assert (len(data.train), data.test and len(data.test)) == (8, tested)
        assert sum(count for count, _ in data.left_out.values()) == (2 if tested else 3)


def mutated(content: bytes, draw: np.random.Generator) -> bytes:
    """Some bytes changed, zeroed, lost or repeated, or the end cut off."""
    at, length = int(draw.integers(len(content))), int(draw.integers(1, 6000))
    kind = draw.integers(6)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ int(draw.integers(1, 256))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    start = at // 512 * 512 if draw.integers(2) else at
    piece = content[start : start + length]
    middle = [b"", bytes(len(piece)), draw.bytes(len(piece)), piece * 2][kind - 2]
    return content[:start] + middle + content[start + length :]


def account(data: DataSplit, whole: set[bytes], count: int) -> None:
    """Every image that is read is one that was written; what is missing was said."""
    read = 0
    for index in range(len(data.train)):
        try:
            assert data.train.read(index, 64).tobytes() in whole
            read += 1
        except ImageError:
            pass
    assert len(data.train) >= count or data.lost or data.left_out


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_nothing_is_lost_in_silence(kind: str, tmp_path: Path) -> None:
    """Mutations of a file: no other error than one that is said, no image lost without a word."""
    (path,) = collections.WRITERS[kind](tmp_path, collections.SHARD).iterdir()
    data, content = open_data(str(path), 0.0, 0), path.read_bytes()
    count, whole = len(data.train), {data.train.read(i, 64).tobytes() for i in range(len(data.train))}
    for seed in range(MUTATIONS):
        path.write_bytes(mutated(content, np.random.default_rng(seed)))
        try:
            account(open_data(str(path), 0.0, 0, lost_share=1.0), whole, count)
        except InputError as error:
            assert str(error).startswith("data: expected"), seed


def test_compressed_and_special_files(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(3)})
    (tmp_path / "b.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    os.mkfifo(tmp_path / "c.tar")
    with pytest.raises(InputError, match=r"b.tar: is compressed, expected a .*c.tar: not a regular"):
        open_data(str(tmp_path), 0.25, 0)


def test_whole_members_behind_damage_are_used(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", {f"{i}.png": encoded(i) for i in range(9)})
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[3]
    content[fourth.offset + 150] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"is damaged at byte {fourth.offset:,}: 4,096 bytes are lost"):
        open_data(str(path), 0.0, 0)
    train = open_data(str(path), 0.0, 0, lost_share=1.0).train
    assert isinstance(train.storage, Shards)
    assert list(train.storage.names) == [f"{i}.png" for i in range(9) if i != 3]
