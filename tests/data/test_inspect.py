"""`poa data check`: what images there are, what cannot be read, and what both splits have."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import fails
from poa.__main__ import main
from poa.data.inspect import nearest_hashes, perceptual_hash


def scene(number: int) -> Image.Image:
    """A smooth picture of 90 x 60 pixels, different for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    """Half as large, brighter, with the artefacts of JPEG."""
    file = io.BytesIO()
    image.resize((45, 30)).point(lambda value: value * 0.8 + 40).save(file, "JPEG", quality=40)
    return Image.open(file)


def test_hashes_of_copies_are_near_and_of_others_far() -> None:
    hashes = np.array([perceptual_hash(np.asarray(scene(n))) for n in range(20)], dtype=np.uint64)
    copies = [perceptual_hash(np.asarray(recompressed(scene(n)))) for n in range(20)]
    bits, positions = nearest_hashes(np.array(copies, dtype=np.uint64), hashes)
    assert positions.tolist() == list(range(20)) and bits.max() <= 6
    apart = np.bitwise_count(hashes[:, None] ^ hashes)
    assert apart[~np.eye(20, dtype=bool)].min() > 10
    assert perceptual_hash(np.full((9, 9, 3), 7, np.uint8)) == perceptual_hash(
        np.full((40, 20, 3), 7, np.uint8)
    )


def test_nearest_hashes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poa.data.inspect.CHUNK", 12)
    queries, bank = np.arange(7, dtype=np.uint64), np.array([0b111, 0b100, 0], dtype=np.uint64)
    bits, positions = nearest_hashes(queries, bank)
    assert bits.tolist() == [0, 1, 1, 1, 0, 1, 1]
    assert positions.tolist() == [2, 2, 2, 0, 1, 0, 0]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two splits of two classes; a copy of a cat among the dogs to test with, and a file cut off."""
    for number in range(12):
        split, label = ("train", "test")[number // 8], ("cat", "dog")[number % 2]
        folder = tmp_path / "photos" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        scene(number).save(folder / f"{number}.png")
    recompressed(scene(0)).save(tmp_path / "photos/test/dog/copy.jpg")
    whole = (tmp_path / "photos/train/cat/2.png").read_bytes()
    (tmp_path / "photos/train/cat/2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos/train/cat/notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_what_is_said_of_images(photos: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "check.json"
    options = ["--run", str(trained), "--similarity", "0", "--workers", "0", "--device", "cpu"]
    assert main(["data", "check", str(photos), *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        f"data: 8 images of {photos} to train on in 2 classes (cat, dog), labels from class folders; "
        "5 held out for k-NN"
    )
    assert said[1].startswith("left out: 1 ") and "notes.txt" in said[1]
    assert said[2] == "classes: 2, from 4 training images (cat) to 4 (dog), median 4"
    assert said[3] == "sizes: 45 x 30 to 90 x 60 pixels (width x height), median 90 x 60"
    assert said[4].startswith(f"unreadable: 1 of 13 images ({photos}/train/cat/2.png: ")
    assert said[5] == (
        "near-duplicates: 1 of 5 held-out images in training (in at most 6 of 64 hash bits), 1 of them with "
        "another label"
    )
    copy, original = str(photos / "test/dog/copy.jpg"), str(photos / "train/cat/0.png")
    assert said[6].startswith(f"  {copy} is like {original} (")
    assert said[7].startswith("near-duplicates: 5 of 5 held-out images in training (cosine similarity of ")
    report = json.loads(out.read_text())
    by_hash, *by_features = report["near_duplicates"]
    assert by_hash["held_out"] == copy and by_hash["labels"] == ["dog", "cat"] and by_hash["bits"] <= 6
    assert len(by_features) == 5 and len(report["unreadable"]) == 1
    assert [original] == [pair["train"] for pair in by_features if pair["held_out"] == copy]
    similarities = [pair["similarity"] for pair in by_features]
    assert similarities == sorted(similarities, reverse=True)


def test_without_labels_nothing_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene(0).save(tmp_path / "0.png")
    assert main(["data", "check", str(tmp_path), "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "sizes: all 90 x 60 pixels",
        "unreadable: 0 of 1 images",
        "near-duplicates: not looked for, there are no held-out images (no labels)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "got 'nowhere': no such folder or file"),
        (["digits", "--bits", "65"], "argument --bits: expected a number in [0, 32], got '65'"),
        (["digits", "--run", "nowhere"], "nowhere"),
        (["digits", "holdot=0.1"], "did you mean 'data.holdout'"),
        ([], "the following arguments are required: PATH (see"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_checks(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "data", "check", *arguments)
