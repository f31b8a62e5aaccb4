"""Shards, tables and lists beside folders; damaged, odd and missing images."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import collections_of_images as collections
from helpers.collections_of_images import CLASSES, WRITERS, write_odd
from helpers.run_folders import newest, rows
from helpers.tiny import tiny_config
from poa.data.decode import ImageError
from poa.data.loader import SampleStream, evaluation_batches, training_batches
from poa.data.sources import ImageSource, open_data
from poa.data.storage import read_folder, tar
from poa.errors import InputError
from poa.images import require_readable
from poa.train import pretrain

COUNT = 30


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("block", [1, 4])
def test_the_same_batches_from_everywhere(workers: int, block: int, tmp_path: Path) -> None:
    loaded = {}
    for name, write in WRITERS.items():
        data = open_data(str(write(tmp_path / name, COUNT)), 0.25, seed=3)
        assert data.test is not None and data.lost == ()
        stream = SampleStream(len(data.train), 4, range(2), 2, range(5), 3, block=block)
        loaded[name] = (data, list(training_batches(data.train, stream, 32, workers)))
    folder, expected = loaded["folder"]
    for name, (data, batches) in loaded.items():
        assert np.array_equal(data.train.labels, folder.train.labels), name
        assert np.array_equal(data.test.positions, folder.test.positions), name
        for ours, theirs in zip(batches, expected, strict=True):
            assert torch.equal(ours.images, theirs.images) and torch.equal(ours.sizes, theirs.sizes), name
            assert ours.unreadable == []
    assert loaded["parquet"][0].train.classes == loaded["list"][0].train.classes == CLASSES


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_splits_by_name(kind: str, tmp_path: Path) -> None:
    write = WRITERS[kind]
    for part, count in (("train", 15), ("val", 6)):
        write(tmp_path / part, count)
        for path in sorted((tmp_path / part).iterdir()):
            path.rename(tmp_path / f"{part}-{path.name}")
        (tmp_path / part).rmdir()
    split = open_data(str(tmp_path), 0.25, seed=0)
    assert (len(split.train), len(split.test or ())) == (15, 6)


def test_shards_in_train_and_val_folders(tmp_path: Path) -> None:
    collections.write_shards(tmp_path / "train", 15)
    collections.write_shards(tmp_path / "val", 6)
    split = open_data(str(tmp_path), 0.25, seed=0)
    assert (len(split.train), len(split.test or ())) == (15, 6)


def test_shards_are_listed_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = collections.write_shards(tmp_path / "shards", COUNT)
    listed = []
    whole = tar.list_shard
    monkeypatch.setattr(tar, "list_shard", lambda path: listed.append(path.name) or whole(path))
    first, again = (open_data(str(root), 0.25, 0) for _ in range(2))
    assert listed == [f"part-{i:04}.tar" for i in range(4)]
    assert [first.train.storage.name(i) for i in range(COUNT)] == [
        again.train.storage.name(i) for i in range(COUNT)
    ]
    assert first.train.storage.name(9) == f"{root}/part-0001.tar:000009.png"
    collections.write_shards(root, COUNT - 9)  # changed: the first two have other times, the third is shorter
    os.remove(root / "part-0003.tar")
    assert len(open_data(str(root), 0.25, 0).train.storage) == COUNT - 9
    for file in (cache / "poa" / "shards").iterdir():
        file.write_bytes(b"damaged")
    assert len(open_data(str(root), 0.25, 0).train.storage) == COUNT - 9


def test_lost_shards(tmp_path: Path) -> None:
    root = collections.write_shards(tmp_path / "shards", COUNT)
    pattern = f"{root}/part-{{0000..0004}}.tar"
    whole = (root / "part-0001.tar").read_bytes()
    (root / "part-0001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        InputError, match=r"got 2 of 5 missing or damaged .*part-0001.tar: is damaged.*part-0004"
    ):
        open_data(pattern, 0.25, 0)
    data = open_data(pattern, 0.25, 0, lost_share=0.4)
    kept = int(data.lost[0].split("; ")[1].split()[0])
    assert 0 < kept < 8 and len(data.train.storage) == COUNT - 8 + kept
    assert data.lost[1] == f"{root}/part-0004.tar is missing"
    read = [n for batch in evaluation_batches(data.train, 32, 0) for n in batch.positions.tolist()]
    assert read == list(range(len(data.train)))  # all that is listed is readable


def test_damaged_tables(tmp_path: Path) -> None:
    root = collections.write_parquet(tmp_path, COUNT)
    (root / "part-0002.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="got 1 of 4 missing or damaged .*part-0002.parquet is damaged"):
        open_data(str(root), 0.25, 0)
    assert len(open_data(str(root), 0.25, 0, lost_share=0.25).train.storage) == COUNT - 8


def test_a_shard_that_vanishes_is_unreadable(tmp_path: Path) -> None:
    data = open_data(str(collections.write_shards(tmp_path / "shards", COUNT)), 0.25, 0)
    os.remove(tmp_path / "shards" / "part-0000.tar")
    batches = list(evaluation_batches(data.train, 32, 0))
    lost = [line for batch in batches for line in batch.unreadable]
    assert len(lost) + sum(len(batch.images) for batch in batches) == len(data.train)
    assert lost and all("part-0000.tar:" in line and "No such file" in line for line in lost)


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_images(workers: int, tmp_path: Path) -> None:
    """Right counts, right pixels, no crash, no file left open."""
    readable, unreadable = write_odd(tmp_path / "odd")
    assert len(readable) == 7 and len(unreadable) == 6
    source = ImageSource.whole(read_folder(tmp_path / "odd"))
    list(evaluation_batches(source, 64, workers))  # starts what multiprocessing keeps
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    (batch,) = evaluation_batches(source, 64, workers)
    names = {Path(source.storage.name(i)).name for i in batch.positions.tolist()}
    assert names == readable
    assert {Path(line.partition(": ")[0]).name for line in batch.unreadable} == unreadable
    ramp = np.linspace(0, 255, 1200).reshape(30, 40)
    for image, position in zip(batch.images, batch.positions.tolist(), strict=True):
        name = Path(source.storage.name(position)).name
        tolerance = 255 if name == "bits.png" else 12 if name == "cmyk.jpg" else 2
        assert np.abs(image[:, :30, :40].numpy() - ramp).max() <= tolerance, name
    del batch, image  # tensors from workers are files of shared memory
    deadline = time.monotonic() + 10  # threads of queues close theirs when they come to it
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


MEMORY_OF_READING = """
import resource, sys
from pathlib import Path
from poa.data.decode import ImageError
from poa.data.sources import ImageSource
from poa.data.storage import read_folder

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

source = ImageSource.whole(read_folder(Path(sys.argv[1])))
before = peak()
for index in range(len(source)):
    try:
        print(source.read(index, 256).shape)
    except ImageError as error:
        print(error)
print(peak() - before)
"""


def test_large_images_take_little_memory(tmp_path: Path) -> None:
    """A JPEG is decoded small, of 183 MiB; a PNG of 380 MiB is refused unseen."""
    Image.new("RGB", (8000, 8000), (90, 60, 30)).save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(collections.huge_png(20000))
    command = [sys.executable, "-c", MEMORY_OF_READING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, refused, mib = done.stdout.splitlines()
    assert small == "(256, 256, 3)" and "exceeds limit" in refused
    assert float(mib) < 40


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_unreadable_images(workers: int, tmp_path: Path) -> None:
    root = collections.write_folder(tmp_path / "images", COUNT)
    for path in sorted(root.glob("*/*.png"))[::6]:
        path.write_bytes(path.read_bytes()[:200])
    options = [f"data.source={root}", f"performance.workers={workers}", "run.evaluate_every=3"]
    with pytest.raises(
        InputError, match=r"at most 0.10% unreadable images .* got \d+ among \d+; .*jsonl; the last"
    ):
        pretrain(tiny_config(*options, "data.unreadable_share=0.001"), tmp_path / "strict")
    pretrain(tiny_config(*options, "data.unreadable_share=0.02"), tmp_path / "run")
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert logged[0]["unreadable"] == 0 < logged[-1]["unreadable"] < 20
    named = [json.loads(line)["image"] for line in (tmp_path / "run" / "unreadable.jsonl").open()]
    assert len(named) == len(set(named)) <= 5 and all(".png: " in name for name in named)
    assert newest(tmp_path / "run")["unreadable"] == logged[-1]["unreadable"]
    again = tmp_path / "again"
    pretrain(tiny_config(*options, "data.unreadable_share=0.02"), again)
    assert rows(again) == rows(tmp_path / "run")


def test_nothing_but_unreadable_images(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    config = tiny_config(f"data.source={tmp_path}")
    with pytest.raises(InputError, match="expected readable images, got none of 3 tried: .*0.p"):
        pretrain(config, tmp_path / "run")
    source = config.data.open(0).train
    with pytest.raises(InputError, match="expected readable images, got 20 in a row that are not"):
        next(training_batches(source, SampleStream(3, 4, range(1), 1, range(1), 0), 32, 0))


def test_some_unreadable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (collections.write_folder(tmp_path, 15) / "cat" / "0000.png").write_bytes(b"")
    require_readable(open_data(str(tmp_path), 0.0, 0).train, 32)
    assert "1 of 15 images tried cannot be read: " in caplog.text and "file is empty" in caplog.text


def test_a_lost_shard_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = collections.write_shards(tmp_path / "shards", COUNT)
    caplog.set_level(logging.WARNING)
    options = [f"data.source={root}/part-{{0000..0004}}.tar", "data.unreadable_share=0.2"]
    pretrain(tiny_config(*options), tmp_path / "run")
    assert "part-0004.tar is missing; continuing without it" in caplog.text


LISTS = {
    "empty": ("", "got an empty list"),
    "mixture": ("a.png\tcat\nb.png\n", "got a mixture"),
    "spaces": ("cat/0000.png 0\ncat/0001.png 0\n", r"none of 2 tried.*cat/0000.png 0: No such file"),
    "table": ("path,label\ncat/0000.png,0\n", r"none of 2 tried.*path,label: No such file"),
    "URLs": ("https://host/0.png\n", r"none of 1 tried.*https://host/0.png: No such file"),
    "UTF-16": ("cat/0000.png\ncat/0001.png".encode("utf-16").decode("latin1"), "none of 2 tried.*: embedded"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_wrong_lists(kind: str, tmp_path: Path) -> None:
    content, message = LISTS[kind]
    collections.write_folder(tmp_path, 6)
    (tmp_path / "images.txt").write_text(content, "latin1")
    with pytest.raises(InputError, match=message):
        require_readable(open_data(str(tmp_path / "images.txt"), 0.25, 0).train, 32)


def test_a_list_without_labels(tmp_path: Path) -> None:
    collections.write_folder(tmp_path, 6)
    (tmp_path / "images.txt").write_text("".join(f"{p}\n" for p in sorted(tmp_path.glob("*/*.png"))))
    data = open_data(str(tmp_path / "images.txt"), 0.25, 0)
    assert len(data.train) == 6 and data.test is None


def test_tables_without_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="a column of encoded images in .*x.parquet.*, got text, label"):
        open_data(str(tmp_path), 0.25, 0)


def test_rows_without_an_image(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"bytes": collections.encoded(0)}, {"bytes": None}]
    pyarrow.parquet.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    source = open_data(str(tmp_path), 0.25, 0).train
    assert source.read(0, 32).shape == (30, 32, 3)
    with pytest.raises(ImageError, match="row 1 of row group 0: the row has no image"):
        source.read(1, 32)
