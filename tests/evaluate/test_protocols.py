"""A protocol is its file and its registration: everything else follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import processes
from helpers.tiny import OVERRIDES, tiny_config
from poa import evaluate
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.errors import InputError
from poa.evaluate import PROTOCOLS, scores
from poa.evaluate.knn import KNN
from poa.evaluate.protocol import Protocol
from poa.report import write_report
from poa.run import Run

NEAREST_MEAN = Protocol(
    "centroid",
    "score by the nearest mean of a class, too",
    lambda backbone, subnet: lambda images: torch.stack([backbone([images], subnet)[0].cls.float()] * 2, 1),
    lambda train, queries, device, seed: {"top": 0.5, "rows": len(train.labels), "seed": seed},
    lambda score: {"centroid": score["top"]},
    "centroid",
    {"protocol": "nearest mean", "scales": [0.5, 1.0]},
)


def test_all_that_is_said_of_a_protocol_follows_from_its_registration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered = (KNN, NEAREST_MEAN)
    for module in ("evaluate.scores", "evaluate.suite", "cli.parser", "cli.commands"):
        monkeypatch.setattr(f"poa.{module}.PROTOCOLS", registered)
    run = tmp_path / "run"
    assert main(["pretrain", "--out", str(run), *OVERRIDES]) == 0
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "--centroid" in (said := capsys.readouterr().out) and NEAREST_MEAN.help in said
    assert main(["evaluate", str(run), "--centroid", "--initial", "--subnets", "16x1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "centroid: nearest mean; scales 0.5, 1" in lines
    assert lines[4].split()[-5:] == ["k=20", "init", "centroid", "centroid", "init"]
    assert lines[5].split()[-2:] == ["50.0%", "50.0%"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    (row,) = evaluation["subnets"]
    assert row["centroid"] == row["centroid_init"] == {
        "top": 0.5, "rows": evaluation["settings"]["bank_images"], "seed": tiny_config().method.seed,
    }  # fmt: skip
    assert evaluation["settings"]["centroid"] == NEAREST_MEAN.settings
    with pytest.raises(InputError, match="protocols: expected some of knn, centroid, got mean"):
        Run(run).evaluate(protocols="mean")
    write_report([RunFolder(run)], tmp_path / "page.html")
    assert ": centroid</th>" in (tmp_path / "page.html").read_text()


def test_two_ranks_print_and_write_what_one_does(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, with what is left out; settings say of which folder and how many images."""
    scenes = pytest.importorskip("helpers.digit_scenes", exc_type=ImportError)
    masks = scenes.write_scenes(tmp_path, 5, 3) / "masks"
    (masks / "train/images/0000.png").write_bytes(b"no picture")
    asked = ["evaluate", str(trained), "--subnets", "16x1", "32x2", "--quality", "--correspondence"]
    asked += ["--segmentation", str(masks), "steps=2", "--out"]
    assert main([*asked, str(tmp_path / "one.json")]) == 0
    alone = capsys.readouterr()
    (_, out, errors), (_, nothing, other) = processes.run(2, "-m", "poa", *asked, str(tmp_path / "two.json"))
    assert out == alone.out.replace("one.json", "two.json") and nothing == ""
    assert (errors + other).count("segmentation: left out: 1 images or targets that cannot be read") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    settings = one["settings"]["segmentation"]
    assert settings["folder"] == str(masks) and (settings["train_images"], settings["val_images"]) == (4, 3)


def test_evaluations_of_the_same_weights_add_up(run: Path, tmp_path: Path) -> None:
    """Of other subnets, protocols and baselines; of a protocol with other settings, the newer ones."""
    scenes = pytest.importorskip("helpers.digit_scenes", exc_type=ImportError)
    masks = ["--segmentation", str(scenes.write_scenes(tmp_path, 5, 3) / "masks")]
    evaluate = ["evaluate", str(run), "--baselines", "--subnets"]
    assert main([*evaluate, "16x1", "16x2", "--quality", "--retrieval", *masks, "steps=2"]) == 0
    first = json.loads((run / "evaluation.json").read_text())
    evaluate[1] = str(run := run.rename(tmp_path / "moved"))
    assert main([*evaluate, "32x1", "32x2", "--quality", *masks, "steps=3"]) == 0
    both = json.loads((run / "evaluation.json").read_text())
    assert (both["settings"]["run"], both["settings"]["segmentation"]["steps"]) == (str(run), 3)
    rows = [(row["subnet"], "segmentation" in row, row.get("retrieval")) for row in both["subnets"]]
    one, two = (row["retrieval"] for row in first["subnets"])
    assert rows == [
        ("16x1", False, one), ("16x2", False, two), ("32x1", True, None), ("32x2", True, None),
    ]  # fmt: skip
    assert both["baselines"]["pixels"]["retrieval"] == first["baselines"]["pixels"]["retrieval"]
    assert "correlations" not in first
    assert set(both["correlations"]) == {"RankMe", "alpha-ReQ", "LiDAR"}


def test_no_protocol_has_the_name_of_another_value_of_a_subnet() -> None:
    names = [name for p in PROTOCOLS for name in (p.name, p.before)]
    assert len({*names, "subnet", "width", "depth", "params", "flops"}) == len(names) + 5


def test_scores_of_earlier_versions_are_read() -> None:
    """As in the JSON of version 0.1."""
    linear = [{"accuracy": 0.75, "rate": 0.1, "blocks": 4, "mean_patch": True}, {"accuracy": 0.5}]
    row = {"subnet": "16x1", "knn": {"10": 0.5, "20": 0.25}, "knn_init": {"20": 0.1}, "linear": linear}
    assert evaluate.reported(row) == {"k=20": 0.25, "linear": 0.75}
    assert scores.SubnetScore.columns(scores.SubnetScore(None, 0, 0, row)) == {  # type: ignore[arg-type]
        "k=10": 0.5, "k=20": 0.25, "k=20 init": 0.1, "linear": 0.75,
    }  # fmt: skip
