"""Images before other backgrounds: k-NN by variant, and folders that do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import fails
from helpers.digit_backgrounds import VARIANTS, write_backgrounds
from helpers.tiny import tiny_config
from poa.__main__ import main
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import DivergenceError, InputError
from poa.evaluate import suite
from poa.evaluate.backgrounds import (
    BACKGROUNDS,
    BackgroundsConfig,
    backgrounds,
    columns,
    open_backgrounds,
)
from poa.evaluate.baselines import Baseline
from poa.subnets import Subnet

CPU, CROPS = torch.device("cpu"), CropsConfig(global_size=32)


def by(kind: str, folder: Path) -> dict[str, float]:
    config = tiny_config().method.backbone
    baseline: Any = Baseline(kind, config, CROPS)
    opened = open_backgrounds(folder, CROPS, BackgroundsConfig(), LeftOut())
    return backgrounds(baseline, config.space.intact, opened, CPU, 0)


def test_histograms_follow_the_background(tmp_path: Path) -> None:
    write_backgrounds(tmp_path, 100, 40)
    score = by("histogram", tmp_path)
    assert [*score] == list(VARIANTS)
    assert score["original"] > 0.75 and score["only_bg_t"] > 0.6 and score["mixed_rand"] < 0.55
    assert columns(score)["BG gap"] == score["mixed_same"] - score["mixed_rand"] > 0.3
    shutil.rmtree(tmp_path / "mixed_same")
    assert [*columns(by("pixels", tmp_path))] == [n.replace("_", " ") for n in VARIANTS if n != "mixed_same"]


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    write_backgrounds(tmp_path, 40, 20)
    shutil.rmtree(tmp_path / "original" / "train" / "digit3")
    opened = open_backgrounds(tmp_path, CROPS, BackgroundsConfig(), left_out := LeftOut())
    assert opened.train.classes == ("digit0", "digit1", "digit2", "digit4")
    for name, images in opened.variants.items():
        (kept,) = {images.classes}
        assert kept == opened.train.classes and len(images) == len(
            [*(tmp_path / name / "val").glob("digit[!3]/*")]
        )
    others = len([*tmp_path.glob("*/val/digit3/*")])
    assert str(left_out).startswith(f"{others} images of no class of original/train (")
    for lost, message in (
        ("original/train/digit[0123]", "original/train, got 1 classes"),
        ("mixed_rand/val", "mixed_rand/val, got no such folder"),
        ("original/train", "original/train, got no such folder"),
    ):
        folder = write_backgrounds(tmp_path / lost, 40, 20)
        for place in folder.glob(lost):
            shutil.rmtree(place)
        with pytest.raises(InputError, match=f"--backgrounds: expected class folders in .*{message}"):
            open_backgrounds(folder, CROPS, BackgroundsConfig(), LeftOut())


def test_a_run_is_scored(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = write_backgrounds(tmp_path / "backgrounds", 20, 10), tmp_path / "scores.json"
    (folder / "only_fg/val/digit0").mkdir(exist_ok=True)
    (folder / "only_fg/val/digit0/torn.png").write_bytes(b"no picture")
    command = ["evaluate", str(trained), "--subnets", "16x1", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--baselines", "--backgrounds", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "mixed rand" in printed and "BG gap" in printed
    assert caplog.text.count("backgrounds: 1 images could not be read, the first is") == 1
    report = json.loads(out.read_text())
    assert (
        {*report["subnets"][0]["backgrounds"]}
        == {*VARIANTS}
        == {*report["baselines"]["pixels"]["backgrounds"]}
    )
    assert "expected class folders in" in fails(capsys, *command, "--backgrounds", str(tmp_path / "none"))


def test_a_late_failure_keeps_the_scores_before_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(backbone: Any, subnet: Subnet, *rest: Any) -> dict[str, float]:
        if subnet.width == 32:
            raise DivergenceError("backgrounds: expected finite features, got NaN")
        return backgrounds(backbone, subnet, *rest)

    folder, out = write_backgrounds(tmp_path / "backgrounds", 20, 10), tmp_path / "scores.json"
    options = ["--device", "cpu", "--out", str(out), "--backgrounds", str(folder)]
    with monkeypatch.context() as patch:
        of_folder = replace(BACKGROUNDS.folder, score=scored)
        patch.setattr(suite, "PROTOCOLS", [suite.KNN, replace(BACKGROUNDS, folder=of_folder)])
        assert main(["evaluate", str(trained), "--subnets", "16x1", "32x1", *options]) != 0
    assert "got NaN" in capsys.readouterr().err
    first, second = json.loads(out.read_text())["subnets"]
    assert first.keys() - second.keys() == {"backgrounds"} and "knn" in second
    assert main(["evaluate", str(trained), "--subnets", "32x1", *options]) == 0
    again, last = json.loads(out.read_text())["subnets"]
    assert again == first and last.keys() == first.keys()
