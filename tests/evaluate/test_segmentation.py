"""Segmentation by patch tokens: the metric, the reading of masks, and both classifiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.commands import fails
from poa.__main__ import main
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.evaluate.segmentation import (
    IGNORED,
    SegmentationConfig,
    confusion,
    knn_logits,
    linear_logits,
    mean_iou,
    open_scenes,
    scored,
    shares,
)

CPU = torch.device("cpu")


def write_scenes(folder: Path, count: int) -> None:
    """Bright squares on dark noise, and their masks."""
    draw = np.random.default_rng(0)
    (folder / "classes.txt").parent.mkdir(exist_ok=True)
    (folder / "classes.txt").write_text("ground\nsquare\n")
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = draw.integers(0, 80, (24, 24, 3), np.uint8), np.zeros((24, 24), np.uint8)
            top, left = draw.integers(0, 12, 2)
            image[top : top + 12, left : left + 12] += 150
            mask[top : top + 12, left : left + 12] = 1
            Image.fromarray(image).save(folder / part / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / part / "masks" / f"{i}.png")


def test_mean_iou_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(5, (2, 4, 30, 30), generator=draw).unbind(0)
    expected = metrics.jaccard_score(truth.flatten(), predicted.flatten(), average="macro")
    assert mean_iou(confusion(predicted, truth.byte(), 7)) == pytest.approx(expected, abs=1e-6)
    hidden = torch.where(torch.rand(truth.shape, generator=draw) < 0.3, IGNORED, truth)
    known = hidden != IGNORED
    expected = metrics.jaccard_score(truth[known], predicted[known], average="macro")
    assert mean_iou(confusion(predicted, hidden.byte(), 5)) == pytest.approx(expected, abs=1e-6)


def test_classifiers_find_what_tokens_tell() -> None:
    options = SegmentationConfig(steps=100)
    draw = torch.Generator().manual_seed(0)
    masks = (
        torch.randint(3, (12, 4, 4), generator=draw).repeat_interleave(6, 1).repeat_interleave(6, 2).byte()
    )
    targets = shares(masks, 4, 3)
    assert torch.equal(targets.argmax(2).view(12, 4, 4), masks[:, ::6, ::6].long())
    assert not shares(torch.full((1, 4, 4), IGNORED, dtype=torch.uint8), 2, 3).any()
    tokens = targets @ torch.randn(3, 8, generator=draw) + 0.1 * torch.randn(12, 16, 8, generator=draw)
    noise = torch.randn(12, 16, 8, generator=draw)
    for x, least, most in ((tokens, 0.6, 1.0), (noise, 0.0, 0.45)):
        for logits in (
            linear_logits(x[:8], targets[:8], x[8:], options, 0, CPU),
            knn_logits(x[:8], targets[:8], x[8:], CPU),
        ):
            assert least <= scored(logits, masks[8:]) <= most


def test_wrong_scenes_are_counted(tmp_path: Path) -> None:
    write_scenes(tmp_path, 6)
    masks = tmp_path / "train" / "masks"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / "0.png")
    Image.fromarray(np.full((24, 24), 2, np.uint8)).save(masks / "1.png")
    (masks / "2.png").unlink()
    (tmp_path / "train" / "images" / "notes.txt").write_text("no picture")
    left_out = LeftOut()
    train, val, classes, _ = open_scenes(
        tmp_path, CropsConfig(global_size=24), SegmentationConfig(), left_out
    )
    assert (len(train.images), len(val.images), classes) == (3, 6, 2)
    for counted in ("masks of another size than their image", "masks with classes above 1", "cannot be read"):
        assert counted in str(left_out)
    assert "notes.txt" in str(left_out)
    assert float(val.masks.float().mean()) == pytest.approx(0.25, abs=0.01)


def test_a_run_segments(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenes(tmp_path / "scenes", 8)
    asked = ["evaluate", str(trained), "--subnets", "16x1", "--out", str(tmp_path / "a.json")]
    assert main([*asked, "--segmentation", str(tmp_path / "scenes"), "steps=50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[-1].endswith("%") and "mIoU" in lines[-3]
    assert "expected" in fails(capsys, *asked, "--segmentation", str(tmp_path))
