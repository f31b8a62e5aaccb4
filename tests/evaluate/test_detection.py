"""Detection: annotations in, detectors on pyramids of subnets, average precision out."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from helpers import collections_of_images as collections
from helpers import processes
from helpers.commands import fails
from helpers.tiny import tiny_config, tiny_pyramid
from poa.__main__ import main
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import InputError
from poa.evaluate.coco import CocoImages, _is_mask, average_precisions, read_coco
from poa.evaluate.detection import DetectionConfig, Opened, Reader, build_detector, detect, train_detector
from poa.evaluate.models import open_peer
from poa.step import initial_network

pytest.importorskip("torchvision.models.detection", exc_type=ImportError)
pytest.importorskip("faster_coco_eval", exc_type=ImportError)
scenes = pytest.importorskip("helpers.digit_scenes", exc_type=ImportError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written: Path = scenes.write_scenes(tmp_path_factory.mktemp("scenes"), 6, 6, side=64)
    return written / "coco"


def read(folder: Path, left_out: LeftOut | None = None) -> tuple[CocoImages, CocoImages]:
    return read_coco(folder, 3, LeftOut() if left_out is None else left_out)


def test_average_precision_is_that_of_pycocotools(folder: Path) -> None:
    reference = pytest.importorskip("pycocotools.cocoeval", exc_type=ImportError)
    coco = pytest.importorskip("pycocotools.coco")
    _, val = read(folder)
    draw = np.random.default_rng(0)
    predictions = []
    for truth in 8 * val.truth.dataset["annotations"]:
        moved = np.roll(val.truth.annToMask(truth), draw.integers(-4, 5, 2), (0, 1))
        box = np.array(truth["bbox"]) * draw.uniform(0.8, 1.2, 4)
        label = truth["category_id"] if draw.random() < 0.7 else int(draw.integers(10))
        about = {"image_id": truth["image_id"], "category_id": label, "score": float(draw.random())}
        runs = coco.maskUtils.encode(np.asfortranarray(moved))
        predictions.append({"bbox": {**about, "bbox": box.tolist()}, "segm": {**about, "segmentation": runs}})
    truth = coco.COCO()
    truth.dataset = val.truth.dataset
    truth.createIndex()
    for kind in ("bbox", "segm"):
        rows = [p[kind] for p in predictions]
        expected = reference.COCOeval(
            truth, truth.loadRes(json.loads(json.dumps(rows, default=bytes.decode))), kind
        )
        expected.params.imgIds = val.ids[:5]
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
        got = average_precisions(val.truth, rows, kind, val.ids[:5])
        assert [*got.values()] == pytest.approx(expected.stats[:3], abs=1e-6)
        assert 0.02 < got["AP"] < got["AP50"] < 1
    assert average_precisions(val.truth, [], "bbox", val.ids) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


def test_annotations_that_cannot_be_used_are_counted(folder: Path, tmp_path: Path) -> None:
    copied: Path = scenes.write_scenes(tmp_path, 5, 2, side=64) / "coco"
    file = copied / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    (copied / "train/0000.png").unlink()
    (copied / "train/0001.png").write_bytes(b"no picture")
    good = next(a for a in content["annotations"] if a["image_id"] == 2)
    before = len(content["annotations"])
    wrong = (
        {"bbox": [5, 5, 0, 9]}, {"bbox": [70, 5, 9, 9]}, {"bbox": [1, 2, 3]}, {"category_id": 77},
        {"image_id": 99}, {"segmentation": []}, {"bbox": ["1", 2, 3, 4]}, {"category_id": [1]},
        {"segmentation": {"size": [5, 5], "counts": [0, 25]}},
        {"segmentation": [[1, 1, 5, float("nan"), 9, 9]]},
        {"segmentation": {"size": [64, 64], "counts": [9, 9]}}, {"segmentation": [[1e30, 1, 5, 5, 9, 9]]},
        {"segmentation": {"size": [64, 64], "counts": "P1"}}, {"iscrowd": "x"}, {"id": good["id"]},
    )  # fmt: skip
    content["annotations"] += [good | {"id": 1000 + i} | change for i, change in enumerate(wrong)]
    file.write_text(json.dumps(content))
    left_out = LeftOut()
    train, _ = read(copied, left_out)
    for counted in (
        "1 images that are missing", "2 boxes that are empty or outside", "2 annotations without a box",
        "2 annotations of categories outside the list", "1 annotations of images outside the list",
        "6 annotations without a mask that fits", "1 annotations whose iscrowd",
        "1 annotations whose id another",
    ):  # fmt: skip
        assert counted in str(left_out)
    missing = sum(a["image_id"] == 0 for a in content["annotations"])
    assert (len(train), len(train.truth.anns)) == (4, before - missing)
    reader = Reader(train, DetectionConfig(batch_size=3))
    assert [len(batch) for batch in reader.batches(range(4))] == [2, 1]
    (unread,) = reader.unread
    assert "0001.png: not an image" in unread
    untold = Reader(train, DetectionConfig())
    with pytest.raises(InputError, match="expected training images that can be read, got none"):
        untold.tell("training")
    file.write_text(json.dumps(content | {"images": [*content["images"], content["images"][3]]}))
    with pytest.raises(InputError, match="expected images with integers of their own as id, got 3 twice"):
        read(copied)
    content["categories"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected the categories of instances_train.json, got others"):
        read(copied)
    file.unlink()
    with pytest.raises(InputError, match=r"expected one file .*instances_train\*.json, got 0"):
        read(copied)


def test_run_lengths_in_text_are_those_of_their_image() -> None:
    api, draw = pytest.importorskip("faster_coco_eval").mask, np.random.default_rng(0)
    for side in (1, 7, 40):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = (draw.random((side, side)) < share).astype(np.uint8)
            text = api.encode(np.asfortranarray(mask))["counts"]
            text = text.decode() if isinstance(text, bytes) else text
            value = {"size": [side, side], "counts": text}
            assert _is_mask(value, side, side)
            assert not _is_mask(value, side, side + 1) and not _is_mask(
                value | {"counts": text[:-1]}, side, side
            )
            assert not _is_mask(value | {"counts": text + "~"}, side, side)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_a_detector_of_a_subnet(kind: str, frozen: bool, folder: Path) -> None:
    """It learns, and a subnet only where it is fine-tuned; its boxes and masks fit its images."""
    config = tiny_config() if kind == "vit" else tiny_pyramid(kind)
    backbone = initial_network(config).backbone.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    options = DetectionConfig(
        epochs=1.0, batch_size=3, size=64, channels=8, regions=16, frozen=frozen, lr=1e-2
    )
    opened = Opened(*read(folder), options, CropsConfig())
    model = build_detector(backbone, backbone.space.smallest, opened)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train_detector(model, Reader(opened.train, options), options, 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert {name.split(".")[0] for name in changed} == {"backbone", "rpn", "roi_heads"}
    assert any("trained" in name for name in changed) != frozen
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    model.roi_heads.score_thresh = 0.0
    ids, predictions = detect(model, Reader(opened.val, options))
    assert ids == opened.val.ids and predictions
    assert all(p["segmentation"]["size"] == [64, 64] and p["category_id"] in range(10) for p in predictions)
    boxes = torch.tensor([p["bbox"] for p in predictions])
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 64.01).all()


def test_a_run_is_scored_beside_its_beginning(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    asked = ["evaluate", str(trained), "--subnets", "16x1", "--initial", "--out", str(out), "--detection"]
    small = ["epochs=0.5", "batch_size=3", "size=64", "channels=8", "regions=16"]
    assert main([*asked, str(folder), *small]) == 0
    assert "mask AP50" in (said := capsys.readouterr().out) and "detection: Mask R-CNN" in said
    written = json.loads(out.read_text())
    assert written["settings"]["detection"]["size"] == 64
    (row,) = written["subnets"]
    assert all(0 <= row[name]["segm"]["AP"] <= 1 for name in ("detection", "detection_init"))
    beside = [*asked[:-2], str(tmp_path / "b.json"), asked[-1]]
    done = processes.run(2, "-m", "poa", *beside, str(folder), *small)
    assert done[1][1] == ""
    (together,) = json.loads((tmp_path / "b.json").read_text())["subnets"]
    assert together["detection"]["segm"] == pytest.approx(row["detection"]["segm"], abs=1e-3)
    assert main(["extract", str(trained), "--subnets", "16x1", "--out", str(tmp_path)]) == 0
    images = ["--data", str(collections.write_folder(tmp_path / "images", 8)), "--detection", str(folder)]
    model = tmp_path / "vit-16x1"
    assert main(["evaluate", str(model), *images, *small]) == 0
    (alone,) = json.loads((model / "evaluation.json").read_text())["subnets"]
    assert alone["detection"]["segm"] == pytest.approx(row["detection"]["segm"], abs=1e-3)
    assert main(["evaluate", str(model), *images, *small, "frozen=false"]) == 0
    with mock.patch("poa.evaluate.sweep.score") as others:
        wrong = fails(capsys, *asked, str(folder), "size=65")
    assert "detection.size: expected a multiple of 16, got 65" in wrong and not others.called
    assert "expected one file" in fails(capsys, *asked, str(tmp_path))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_peer_of_timm_is_scored(
    name: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the size of the detector; its last map is its patch tokens."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    asked = ["evaluate", f"timm:{name}", "--data", str(collections.write_folder(tmp_path / "images", 8))]
    asked += ["--out", str(tmp_path / "a.json"), "--detection", str(folder), "epochs=0.5", "batch_size=3"]
    asked += ["size=64", "channels=8", "regions=16"]
    assert main(asked) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["subnets"]
    assert all(0 <= row["detection"][kind]["AP"] <= 1 for kind in ("bbox", "segm"))
    assert "expected true with a model of timm, got false" in fails(capsys, *asked, "frozen=false")
    peer = open_peer(f"timm:{name}").backbone
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        maps = peer.stage_maps(images, peer.space.intact)
        (features,) = peer([images])
    torch.testing.assert_close(maps[-1].flatten(1, 2), features.patches)
