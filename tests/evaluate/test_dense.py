"""Protocols of pixels: the reading of layouts, windows that slide, segmentation and depth."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import collections_of_images as collections
from helpers.commands import fails
from helpers.tiny import tiny_config
from poa.__main__ import main
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import InputError
from poa.evaluate.baselines import Baseline
from poa.evaluate.dense import Pair, Placed, Windows, read_windows
from poa.evaluate.depth import DepthConfig, depth_layer, errors, open_depth
from poa.evaluate.masks import IGNORED, mask_pairs
from poa.evaluate.segmentation import (
    SegmentationConfig,
    confusion,
    knn_votes,
    linear_logits,
    mean_iou,
    open_scenes,
    scored,
    shares,
)
from poa.evaluate.stereo import STEREO, StereoConfig, open_stereo, stereo

CPU = torch.device("cpu")
CROPS = CropsConfig(global_size=24)


def write_scenes(folder: Path, count: int, width: int = 24) -> Path:
    """Bright squares on dark noise, their masks, and as depth 1 of squares, 2 of the ground, else unknown."""
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    (folder / "classes.txt").write_text("ground\nsquare\n")
    for part in ("train", "val"):
        for kind in ("images", "masks", "depth"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = draw.integers(0, 80, (24, width, 3), np.uint8), np.zeros((24, width), np.uint8)
            top, left = draw.integers(0, 12, 2)
            image[top : top + 12, left : left + 12] += 150
            mask[top : top + 12, left : left + 12] = 1
            Image.fromarray(image).save(folder / part / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / part / "masks" / f"{i}.png")
            depth = 2.0 - mask
            depth[0, :2] = np.nan, 0
            if i % 2:
                np.save(folder / part / "depth" / f"{i}.npy", depth)
            else:
                known = np.nan_to_num(1000 * depth).astype(np.uint16)
                Image.fromarray(known).save(folder / part / "depth" / f"{i}.png")
    return folder


def windows_of(masks: torch.Tensor) -> Windows:
    """As if each mask were of an image of one window."""
    count, size, _ = masks.shape
    placed = [Placed((size, size), [(0, 0)], mask) for mask in masks]
    return Windows(np.zeros((count, 3, size, size), np.uint8), masks, placed, CROPS)


def test_mean_iou_and_errors_of_depth_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(5, (2, 4, 30, 30), generator=draw).unbind(0)
    expected = metrics.jaccard_score(truth.flatten(), predicted.flatten(), average="macro")
    assert mean_iou(confusion(predicted, truth.byte(), 7)) == pytest.approx(expected, abs=1e-6)
    hidden = torch.where(torch.rand(truth.shape, generator=draw) < 0.3, IGNORED, truth)
    known = hidden != IGNORED
    expected = metrics.jaccard_score(truth[known], predicted[known], average="macro")
    assert mean_iou(confusion(predicted, hidden.byte(), 5)) == pytest.approx(expected, abs=1e-6)
    found, there = 0.5 + torch.rand(2, 9, 9, generator=draw)
    there[0] = 0
    got, (a, b) = errors(found, there), (there[1:].flatten(), found[1:].flatten())
    assert got["rmse"] == pytest.approx(metrics.root_mean_squared_error(a, b), abs=1e-6)
    assert got["absrel"] == pytest.approx(metrics.mean_absolute_percentage_error(a, b), abs=1e-6)
    assert got["delta1"] == float(((a / b < 1.25) & (b / a < 1.25)).double().mean())


def test_layers_find_what_tokens_tell() -> None:
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randint(3, (12, 4, 4), generator=draw)
    masks = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2).byte()
    targets, val = shares(masks, 4, 3), windows_of(masks[8:])
    assert torch.equal(targets.argmax(2).view(12, 4, 4), masks[:, ::6, ::6].long())
    assert not shares(torch.full((1, 4, 4), IGNORED, dtype=torch.uint8), 2, 3).any()
    tokens = targets @ torch.randn(3, 8, generator=draw) + 0.1 * torch.randn(12, 16, 8, generator=draw)
    noise = torch.randn(12, 16, 8, generator=draw)
    options, depths = SegmentationConfig(steps=100), DepthConfig(steps=200, bins=16, lr=1e-2)
    for x, least, most in ((tokens, 0.6, 1.0), (noise, 0.0, 0.45)):
        linear = linear_logits(x[:8], masks[:8], 3, options, 0, CPU)
        votes = knn_votes(x[:8], masks[:8], 3, options, CPU)
        for logits in (linear, votes):
            with torch.no_grad():
                assert least <= scored(val, x[8:], logits, 3) <= most
        layer = depth_layer(x[:8], 1.0 + masks[:8], depths, 0, CPU)
        with torch.no_grad():
            missed = (layer(x[8:])[..., 0] - 1 - coarse[8:].flatten(1)).square().mean().sqrt()
        constant = coarse[8:].double().std()
        assert (missed < 0.5 * constant) == (x is tokens), missed


def test_windows_cover_images_larger_than_the_network_sees(tmp_path: Path) -> None:
    """What each window shows of the target is put together to the whole again."""
    draw = np.random.default_rng(0)
    for name, shape in (("a", (40, 75)), ("b", (90, 48))):
        Image.fromarray(draw.integers(0, 256, (*shape, 3), np.uint8)).save(tmp_path / f"{name}.png")
    targets = {
        name: draw.random(shape).astype(np.float32) for name, shape in (("a", (40, 75)), ("b", (90, 48)))
    }
    pairs = [Pair(tmp_path / f"{name}.png", lambda name=name: targets[name]) for name in targets]
    options = SegmentationConfig(short_side=40)
    windows = read_windows(pairs, CROPS, options, LeftOut(), "")
    assert [place.size for place in windows.placed] == [(40, 75), (75, 40)]
    assert [len(place.corners) for place in windows.placed] == [2 * 5, 5 * 2]
    (whole, target), (resized, _) = windows.predictions(lambda part: windows.targets[part, None])
    torch.testing.assert_close(whole[0], target)
    assert resized.shape == (1, 90, 48)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    top, left = windows.placed[0].corners[-1]
    assert (top, left) == (16, 51)
    assert torch.equal(torch.from_numpy(windows.images[9].copy()), pixels[:, top:, left:])


def test_layouts_are_read_as_they_come(tmp_path: Path) -> None:
    """The same scenes in three layouts; ADE20K numbers classes from 1, COCO has segments of any number."""
    own = write_scenes(tmp_path / "own", 2)
    ade, coco = tmp_path / "ade", tmp_path / "coco"
    for part, long in (("train", "training"), ("val", "validation")):
        annotations = []
        for place in (ade / "images" / long, ade / "annotations" / long, coco / f"{part}2017",
                      coco / "annotations" / f"panoptic_{part}2017"):  # fmt: skip
            place.mkdir(parents=True)
        for i in range(2):
            image = (own / part / "images" / f"{i}.png").read_bytes()
            (ade / "images" / long / f"{i}.png").write_bytes(image)
            (coco / f"{part}2017" / f"{i}.png").write_bytes(image)
            mask = np.asarray(Image.open(own / part / "masks" / f"{i}.png")).copy()
            Image.fromarray(mask + np.uint8(1)).save(ade / "annotations" / long / f"{i}.png")
            segments = np.zeros((24, 24, 3), np.uint8)
            segments[..., 1] = 1 + mask  # numbers 256 and 512
            Image.fromarray(segments).save(coco / "annotations" / f"panoptic_{part}2017" / f"{i}.png")
            info = [{"id": 256, "category_id": 7}, {"id": 512, "category_id": 90}]
            annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": info})
        images = [{"id": i, "file_name": f"{i}.png"} for i in range(2)]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 7}, {"id": 90}]}
        (coco / "annotations" / f"panoptic_{part}2017.json").write_text(json.dumps(content))
    masks = {}
    for folder, count in ((own, 2), (ade, 150), (coco, 2)):
        parts, classes = mask_pairs(folder)
        assert classes == count
        masks[folder.name] = np.stack([pair.target() for part in parts for pair in part])
    assert np.array_equal(masks["ade"], masks["own"]) and np.array_equal(masks["coco"], masks["own"])
    content["categories"] = [{"id": i} for i in range(255)]
    (coco / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"panoptic_train2017.json: expected 2 to 254 classes, got 255$"):
        mask_pairs(coco)


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    write_scenes(tmp_path, 9)
    masks = tmp_path / "train" / "masks"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / "0.png")
    Image.fromarray(np.full((24, 24), 2, np.uint8)).save(masks / "1.png")
    (masks / "2.png").unlink()
    Image.fromarray(np.full((24, 24), IGNORED, np.uint8)).save(masks / "3.png")
    (masks / "4.png").unlink()
    os.mkfifo(masks / "4.png")  # of which a reader would wait for ever
    (masks / "5.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")  # for which Pillow would start a program
    (tmp_path / "train" / "images" / "notes.txt").write_text("no picture")
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(masks / "6.png")
    left_out = LeftOut()
    train, val, classes, _ = open_scenes(tmp_path, CROPS, SegmentationConfig(), left_out)
    assert (len(train.images), len(val.images), classes) == (2, 9, 2)
    for counted in (
        f"1 targets of another size than their image ({tmp_path}/train/images/0.png: (9, 9) of (24, 24))",
        f"1 masks with classes above 1 ({tmp_path}/train/images/1.png: 2)",
        f"1 images or targets that are missing ({masks}/2.png)",
        "2 images or targets that cannot",
        "1 masks without a class",
        "1 targets that are no PNG (",
        "1 targets that are no PNG of one number in 1, 8 or 16 bits",
    ):
        assert counted in str(left_out)
    assert "notes.txt" in str(left_out)
    assert float(val.targets.float().mean()) == pytest.approx(0.25, abs=0.01)
    train, val, _ = open_depth(tmp_path, CROPS, DepthConfig(images=3), left_out := LeftOut())
    assert len(train.images) == 2 and "notes.txt" in str(left_out)
    assert val.targets[:, 0, :2].count_nonzero() == 0 and set(val.targets.flatten().tolist()) == {
        0.0,
        1.0,
        2.0,
    }
    depth = tmp_path / "train" / "depth"
    Image.fromarray(np.ones((24, 24), np.uint8)).save(depth / "0.png")
    np.save(depth / "1.npy", np.ones((24, 24), np.complex64))
    open_depth(tmp_path, CROPS, DepthConfig(), left_out := LeftOut())
    assert "1 targets that are no PNG of one number in 16 bits" in str(left_out)
    assert "1 targets that are no real numbers" in str(left_out)


def test_training_parts_that_teach_too_little(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is known of the pixels that are seen, or not all classes; class names are missing."""
    write_scenes(tmp_path, 2, width=48)
    for i in range(2):
        mask, depth = np.full((24, 48), IGNORED, np.uint8), np.zeros((24, 48), np.float32)
        mask[0, 1] = depth[0, 1] = 1  # which nearest pixels of half the width miss
        Image.fromarray(mask).save(tmp_path / "train" / "masks" / f"{i}.png")
        (tmp_path / "train" / "depth" / f"{i}.png").unlink(missing_ok=True)
        np.save(tmp_path / "train" / "depth" / f"{i}.npy", depth)
    with pytest.raises(InputError, match="training part of .* got windows of 24 pixels without a class"):
        open_scenes(tmp_path, CROPS, SegmentationConfig(), LeftOut())
    with pytest.raises(InputError, match="known depths in training windows of 24 pixels, got none"):
        open_depth(tmp_path, CROPS, DepthConfig(), LeftOut())
    for i in range(2):
        Image.fromarray(np.zeros((24, 48), np.uint8)).save(tmp_path / "train" / "masks" / f"{i}.png")
    open_scenes(tmp_path, CROPS, SegmentationConfig(), LeftOut())
    assert "1 of 2 validation classes are in no training mask: 1" in caplog.text
    for text, message in (
        ("\n\n", "2 to 254 classes, got 0"),
        ("a\n\nb\n", "on each line, got an empty line 2"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            open_scenes(tmp_path, CROPS, SegmentationConfig(), LeftOut())
    (tmp_path / "classes.txt").write_text("a\nb\n\n")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(InputError, match=r"validation part of .*, got none \(no images there\)"):
        open_scenes(tmp_path, CROPS, SegmentationConfig(), LeftOut())


def test_a_run_and_its_model_are_scored(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same figures, which beat those of constant depth."""
    scenes = write_scenes(tmp_path / "scenes", 8, width=30)
    images = str(collections.write_folder(tmp_path / "images", 8))
    small = [
        "--segmentation",
        str(scenes),
        "steps=50",
        "--monodepth",
        str(scenes),
        "steps=300",
        "lr=1e-2",
        "short_side=28",
    ]
    asked = ["evaluate", str(trained), "--subnets", "16x1", "--data", images]
    assert main([*asked, *small, "--out", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert all(title in said for title in ("mIoU k-NN", "RMSE mean", "monodepth: depth by a linear layer"))
    assert main(["extract", str(trained), "--subnets", "16x1", "--out", str(tmp_path)]) == 0
    model = str(tmp_path / "vit-16x1")
    assert main(["evaluate", model, "--data", images, *small]) == 0
    rows = [
        json.loads(file.read_text())["subnets"][0]
        for file in (tmp_path / "a.json", tmp_path / "vit-16x1/evaluation.json")
    ]
    for name in ("segmentation", "monodepth"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-3)
    assert rows[0]["monodepth"]["rmse"] < rows[0]["monodepth"]["constant"] and rows[0]["depth"] == 1
    assert "expected" in fails(capsys, *asked, "--segmentation", str(tmp_path))
    wrong = fails(capsys, *asked, "--segmentation", str(scenes), "step=1")
    assert "unknown option 'step'; did you mean 'steps'?" in wrong
    wrong = fails(capsys, *asked, "--segmentation", str(scenes), "epochs=1")
    assert "unknown option 'epochs'; expected one of steps, batch_size, lr, weight_decay, " in wrong
    if find_spec("torchvision") is None:
        assert "pip install 'poa-pretrain[detection]'" in fails(capsys, *asked, "--detection", str(scenes))


def test_stereo_pairs_of_known_disparity(tmp_path: Path) -> None:
    """Pixels of noise that moved by a patch are found at their places; what cannot be used is counted."""
    draw = np.random.default_rng(0)
    for kind in ("left", "right", "disparity"):
        (tmp_path / kind).mkdir()
    noise = draw.integers(0, 256, (48, 48, 3), np.uint8)
    for name in ("a", "b", "c", "d"):
        Image.fromarray(noise).save(tmp_path / "left" / f"{name}.png")
        Image.fromarray(np.roll(noise, -8, 1)).save(tmp_path / "right" / f"{name}.png")
        np.save(tmp_path / "disparity" / f"{name}.npy", np.full((48, 48), 8.0))
    Image.fromarray(np.full((48, 48), 8 * 256, np.uint16)).save(tmp_path / "disparity" / "a.png")
    (tmp_path / "disparity" / "a.npy").unlink()
    np.save(tmp_path / "disparity" / "b.npy", np.full((9, 9), 8.0))
    np.save(tmp_path / "disparity" / "c.npy", np.full((48, 48), np.nan))
    (tmp_path / "right" / "d.png").unlink()
    opened = open_stereo(tmp_path, CROPS, StereoConfig(size=48), left_out := LeftOut())
    assert len(opened.images) == 1
    assert "1 targets of another size" in str(left_out) and "d.png" in str(left_out)
    assert "targets without a known value" in str(left_out)
    config = tiny_config().method.backbone
    got = stereo(Baseline("pixels", config, CROPS), config.space.intact, opened, CPU, 0)  # type: ignore[arg-type]
    assert got["0.05"] == 1 and got["same place"] == 0  # a sixth of the side away
    network, odd = config.build(), open_stereo(tmp_path, CROPS, StereoConfig(size=47), LeftOut())
    with pytest.raises(InputError, match=r"stereo.size: crop: expected sides divisible by .*, got 47x47"):
        STEREO.folder.check(network, config.space.smallest, odd)
    (tmp_path / "left" / "a.png").unlink()
    with pytest.raises(InputError, match="--stereo: expected pairs of images in .* with disparity maps, got"):
        open_stereo(tmp_path, CROPS, StereoConfig(), LeftOut())
