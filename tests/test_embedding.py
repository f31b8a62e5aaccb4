"""Features of a source in files: what they hold, whole or not at all, on one process or several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import poa
from helpers import processes
from helpers.collections_of_images import write_folder
from helpers.commands import fails
from poa.__main__ import main
from poa.embedding.pairs import similar_pairs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, with an image that is damaged."""
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, 11)
    next(iter(sorted(folder.rglob("*.*")))).write_bytes(b"damaged")
    return folder


def names_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]


def test_files_hold_what_the_model_says_of_each_image(trained: Path, images: Path, tmp_path: Path) -> None:
    model, (damaged, *readable) = poa.load(trained, "16x1"), names_of(images)
    with torch.no_grad():
        expected = model.backbone([model.preprocess(readable)])[0]
    arguments = [
        "embed",
        str(trained),
        str(images),
        "--subnet",
        "16x1",
        "--workers",
        "0",
        "--batch-size",
        "3",
    ]
    for out in ("f.npz", "f.parquet", "f.npy"):
        tokens = ["patches"] if out == "f.npy" else ["cls", "mean", "patches"]
        assert main([*arguments, "--out", str(tmp_path / out), "--tokens", *tokens]) == 0
    packed, table = np.load(tmp_path / "f.npz"), pq.read_table(tmp_path / "f.parquet")
    assert packed["names"].tolist() == table["name"].to_pylist() == readable
    assert packed["labels"].tolist() == table["label"].to_pylist() == [Path(n).parent.name for n in readable]
    assert json.loads(str(packed["about"]))["model"]["width"] == 16
    assert json.loads(table.schema.metadata[b"poa"])["data"] == str(images)
    for token, value in (
        ("cls", expected.cls),
        ("mean", expected.patches.mean(1)),
        ("patches", expected.patches),
    ):
        np.testing.assert_allclose(packed[token], value, rtol=0, atol=1e-5)
        assert np.array_equal(np.array(table[token].to_pylist(), dtype=np.float32), packed[token])
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, packed["patches"])
    listed = json.loads((tmp_path / "f.json").read_text())["images"]
    assert [row["name"] for row in listed] == readable
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.npy", "f.npz", "f.parquet"]
    again = poa.embed(model, images, workers=0, tokens=["mean"])
    assert np.array_equal(again["mean"], packed["mean"]) and again.names == readable
    assert f"1 unreadable ({damaged}" in repr(again) and f"mean: [{len(readable)}, 16]" in repr(again)


def test_processes_share_the_images_and_keep_their_order(trained: Path, images: Path, tmp_path: Path) -> None:
    arguments = ("embed", str(trained), str(images), "--workers", "0", "--batch-size", "2")
    assert main([*arguments, "--out", str(tmp_path / "1.npz")]) == 0
    processes.run(3, "-m", "poa", *arguments, "--out", str(tmp_path / "3.npz"))
    one, three = (np.load(tmp_path / f"{size}.npz") for size in (1, 3))
    assert one["names"].tolist() == three["names"].tolist() == names_of(images)[1:]
    assert np.array_equal(one["cls"], three["cls"])


def test_neighbours_of_a_query(trained: Path, images: Path, tmp_path: Path) -> None:
    query = names_of(images)[4]
    out, page = tmp_path / "f.npz", tmp_path / "page.html"
    command = ["embed", str(trained), str(images), "--workers", "0", "--batch-size", "4", "--out", str(out)]
    assert main([*command, "--query", query, "--page", str(page), "--neighbours", "3"]) == 0
    text = page.read_text()
    assert text.count("<img") == 4 and f"1.000<br>{Path(query).parent.name}<br>{query}" in text
    nearest = poa.Nearest([Image.open(query)], count=20)
    embeddings = poa.Run(trained).embed(data=images, nearest=nearest, workers=0)
    assert nearest.neighbours[0][0].name == query
    cls = torch.nn.functional.normalize(torch.from_numpy(embeddings["cls"]), dim=1)
    similarity = cls @ cls[embeddings.names.index(query)]
    order = [embeddings.names[i] for i in similarity.argsort(descending=True)]
    assert [neighbour.name for neighbour in nearest.neighbours[0]] == order


def test_pairs_are_those_of_all_similarities(
    trained: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of blocks of any size; an image that lies there twice is found, within a collection and across two."""
    monkeypatch.setattr("poa.embedding.pairs.BLOCK", 3)
    shutil.copytree(images, tmp_path / "images")
    first, second = names_of(tmp_path / "images")[1:3]
    shutil.copy(first, Path(first).with_name("copy" + Path(first).suffix))
    embedded = poa.embed(poa.load(trained), tmp_path / "images", workers=0)
    x, count = torch.nn.functional.normalize(torch.from_numpy(embedded["cls"]), dim=1), embedded.count
    cosines = x @ x.T
    within = similar_pairs(embedded["cls"], None, 0.9, 99, torch.device("cpu"))
    expected = {(i, j) for i in range(count) for j in range(i + 1, count) if cosines[i, j] >= 0.9}
    assert {tuple(pair) for pair in within.positions.tolist()} == expected and within.total == len(expected)
    torch.testing.assert_close(within.similarity, cosines[tuple(within.positions.T)])
    across = similar_pairs(embedded["cls"][:5], embedded["cls"], 0.9, 4, torch.device("cpu"))
    assert across.total == int((cosines[:5] >= 0.9).sum()) and len(across.positions) == 4
    torch.testing.assert_close(across.similarity, cosines[:5].flatten().sort(descending=True).values[:4])
    rows = {}
    for ending in ("npy", "npz", "parquet"):
        features, out, page = (str(tmp_path / f"f.{kind}") for kind in (ending, "pairs.json", "html"))
        poa.embed(poa.load(trained), tmp_path / "images", workers=0, out=features)
        command = ["pairs", features, "--similarity", "0.99999", "--out", out]
        assert main([*command, "--page", page]) == 0
        rows[ending] = json.loads(Path(out).read_text())["pairs"]
        assert Path(page).read_text().count("<img") == 2 * len(rows[ending])
    copy = str(Path(first).with_name("copy" + Path(first).suffix))
    assert {first, copy} in [{row["first"], row["second"]} for row in rows["npy"]]
    assert rows["npy"] == rows["npz"] == rows["parquet"]
    assert (
        main(["pairs", features, "--others", features, "--out", str(tmp_path / "f.csv"), "--most", "2"]) == 0
    )
    assert len((tmp_path / "f.csv").read_text().splitlines()) == 3
    damaged = np.load(tmp_path / "f.npy")
    damaged[1, 2], damaged[2] = np.nan, np.inf
    np.savez(tmp_path / "nan.npz", **dict(np.load(tmp_path / "f.npz")) | {"cls": damaged})
    np.save(tmp_path / "f.npy", damaged)  # of another run than its JSON
    capsys.readouterr()
    assert main([*command, "--most", "1"]) == 0
    assert f"1 of them listed, of 2 of {count} images\n" in capsys.readouterr().out
    assert main(["pairs", str(tmp_path / "nan.npz"), "--out", out]) == 0
    assert f"nan.npz: 2 of {count} images have NaN or inf features, and no pair" in capsys.readouterr().out
    for arguments, message in (
        ([str(tmp_path / "f.npy"), "--out", "f.csv"], "f.json tells of"),
        ([features, "--out", "f.txt"], "--out: expected a name ending in .csv or .json, got f.txt"),
        (["none.npz", "--out", "f.csv"], "none.npz: expected features cls of poa embed"),
        ([features, "--token", "mean", "--out", "f.csv"], "expected features mean of poa embed"),
        ([second, "--out", "f.csv"], "one row for each image, got a damaged or foreign one"),
    ):
        assert message in fails(capsys, "pairs", *arguments)


def test_pairs_are_of_the_same_weights_wherever_they_lie(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run, moved or not, and extracted from it."""
    first, second, others = (str(tmp_path / f"{name}.npz") for name in ("first", "second", "others"))
    poa.embed(poa.load(run, "16x1"), images, workers=0, out=first)
    poa.embed(poa.load(run, "16x2"), images, workers=0, out=others)
    model = poa.load(run := run.rename(tmp_path / "moved"), "16x1")
    out = ["--out", str(tmp_path / "pairs.csv")]
    for again in (model, poa.load(model.save(tmp_path / "model"))):
        poa.embed(again, images, workers=0, out=second)
        assert main(["pairs", first, "--others", second, *out]) == 0
    message = fails(capsys, "pairs", second, "--others", others, *out)
    assert "expected features of one model, got those of 16x1 of " in message
    assert " and 16x2 of " in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "f.csv"], "--out: expected a name ending in .npz, .npy, .parquet, got f.csv"),
        (["--out", "f.npy", "--tokens", "cls", "mean"], "expected one kind of tokens for f.npy, got 2"),
        (
            ["--out", "others.npy"],
            "expected a new file, or an older one of this command to replace, got others",
        ),
        (["--out", "nowhere/f.npz"], "--out: expected a writable file, got nowhere/f.npz"),
        (["--out", "f.npz", "--query", "none.jpg"], "and --page FILE.html together, got --query alone"),
        (
            ["--out", "f.npz", "--query", "none.jpg", "--page", "p.html"],
            "expected an image, got ./none.jpg: No",
        ),
        (["--out", "f.npz", "--subnet", "99x9"], "expected a width of 16, 32"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    trained: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("others.json").write_text("{}")
    assert message in fails(capsys, "embed", str(trained), str(images), "--workers", "0", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["others.json"]


@pytest.mark.parametrize("ending", ["npz", "npy", "parquet"])
def test_nothing_is_left_of_a_source_without_readable_images(
    ending: str, trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    for name in names_of(tmp_path / "images"):
        Path(name).write_bytes(b"damaged")
    out = tmp_path / f"f.{ending}"
    line = fails(capsys, "embed", str(trained), str(tmp_path / "images"), "--workers", "0", "--out", str(out))
    assert "expected readable images, got none of" in line
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
