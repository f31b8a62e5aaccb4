"""What a run tells: figures, other places they go, and the page about it."""

from __future__ import annotations

import base64
import importlib.machinery
import importlib.util
import io
import json
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from benchmarks import roofline
from helpers.collections_of_images import write_folder
from helpers.run_folders import rows
from helpers.tiny import ONE_STEP, tiny_config, tiny_pyramid
from poa import report
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.errors import InputError
from poa.flops import expected_masked, micro_batch_flops
from poa.presets import preset
from poa.report import expected_band, record_band, summary, write_report
from poa.subnets import Subnet
from poa.train import pretrain
from poa.writers import flat

RUN = ["run.evaluate_every=3", "run.save_every=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reported") / "run"
    pretrain(tiny_config(*RUN, "run.knn_subnets=16x2,32x1"), out)
    return out


@pytest.mark.parametrize("name", ["vit-l16", "quickstart"])
def test_flops_are_those_of_the_cost_model(name: str) -> None:
    method = preset(name).method
    for elastic in (method.backbone.space.intact, method.backbone.space.smallest):
        for masked in (0, int(expected_masked(method))):
            work = roofline.Workload(method, method.batch_size, masked, skip_dead_tokens=False)
            model = roofline.Summary.of(roofline.step(work, elastic), roofline.H200).flops
            assert micro_batch_flops(method, elastic, masked) == pytest.approx(model, rel=1e-9)


def test_figures(trained: Path) -> None:
    logged = [row for row in RunFolder(trained).rows() if "loss" in row]
    row = logged[-1]
    assert {
        "target_entropy.0",
        "prototypes_used.1",
        "feature_std.intact",
        "feature_std.elastic",
    } <= row.keys()
    assert {"loss", "intact.dino.0", "elastic.ibot.1", "elastic.distill.0", "grad_norm.head"} <= row.keys()
    assert sum(row["subnets"].values()) == 1 and row["balance"] == 1
    assert len(row["rank_seconds"]) == 1 and 0 < row["rank_seconds"][0] < 8 / row["images_per_s"]
    assert row["mfu"] is None and row["peak_gib"] > 0.05
    flops = micro_batch_flops(
        tiny_config().method, Subnet.parse(next(iter(row["subnets"]))), expected_masked(tiny_config().method)
    )
    assert row["tflop_per_s"] * 1e12 == pytest.approx(flops / 8 * row["images_per_s"], rel=1e-6)
    scores = [row["knn"] for row in RunFolder(trained).rows() if "knn" in row]
    assert scores[0].keys() == {"k", "teacher 16x2", "teacher 32x1", "student 32x2"}
    for key in ("rankme", "alpha_req", "lidar"):
        figures = [row[key] for row in RunFolder(trained).rows() if key in row]
        assert len(figures) == len(scores) and figures[0].keys() == scores[0].keys() - {"k"}
        least, most = (0, 20) if key == "alpha_req" else (1, 32)
        assert all(least < value <= most for row in figures for value in row.values())


def test_mfu_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poa.metrics.datasheet_peak", lambda device: 1e12)
    pretrain(tiny_config(*ONE_STEP), tmp_path / "run")
    (row,) = RunFolder(tmp_path / "run").rows()
    assert row["mfu"] == pytest.approx(row["tflop_per_s"], rel=1e-9)


def test_tensorboard_shows_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    pretrain(tiny_config(*RUN, "run.log_to=tensorboard"), out)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    expected = {}
    for row in RunFolder(out).rows():
        for name, value in flat(row).items():
            expected.setdefault(name.replace(".", "/"), []).append((row["step"], value))
    del expected["step"]
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert {"loss", "knn/teacher 32x2", "intact/dino/0", "subnets/16x1"} <= shown.keys() == expected.keys()
    for tag, points in expected.items():
        assert [s for s, _ in shown[tag]] == [s for s, _ in points]
        assert [v for _, v in shown[tag]] == pytest.approx([v for _, v in points], rel=1e-6)


def test_wandb_gets_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which needs an account."""
    started, logged = [], []

    class Started:
        def log(self, figures: dict, step: int) -> None:
            logged.append((step, figures))

        def finish(self) -> None:
            logged.append("finished")

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.util = types.SimpleNamespace(generate_id=lambda: "abc123")
    fake.init = lambda **options: started.append(options) or Started()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "run"
    pretrain(tiny_config("run.log_to=wandb"), out)
    expected = [
        (row["step"], {k: v for k, v in flat(row).items() if k != "step"}) for row in RunFolder(out).rows()
    ]
    assert logged == [*expected, "finished"]
    pretrain(tiny_config("run.log_to=wandb"), out, resume=True)
    assert [(s["id"], s["resume"], s["name"]) for s in started] == [("abc123", "allow", "run")] * 2
    assert started[0]["config"]["method"]["batch_size"] == 8


def test_wandb_where_it_is_not(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("about an environment without wandb")
    with pytest.raises(InputError, match="run.log_to: expected wandb to be installed; pip install wandb"):
        pretrain(tiny_config("run.log_to=wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="log_to: expected .*tensorboard|wandb"):
        tiny_config("run.log_to=mlflow")


def test_the_page(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained)]) == 0
    page = (trained / "report.html").read_text()
    assert page.count("<svg") == 1 and page.endswith("</html>\n")
    for name, value in summary(RunFolder(trained).rows()).items():
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in page
    assert "<p>None.</p>" in page  # alarms
    assert main(["report", str(trained), "--out", str(trained / "report.png")]) == 0
    assert (trained / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="expected .html or a picture such as .png, got .*x.nothing"):
        write_report([RunFolder(trained)], trained / "x.nothing")
    with pytest.raises(InputError, match="report: expected metrics in .* got none yet"):
        write_report([RunFolder(trained / "models")], trained / "x.html")


def test_the_page_tells_what_was_said_evaluated_and_seen(trained: Path) -> None:
    assert main(["evaluate", str(trained), "--subnets", "16x1", "32x2"]) == 0
    (trained / "evaluation-2.json").write_text('{"settings": []}')
    assert main(["report", str(trained)]) == 0
    page = (trained / "report.html").read_text()
    assert "data: 1,347 images of digits to train on in 10 classes" in page
    assert "<p>Dotted: learning rate rises until 2, prototypes train from 1, " in page
    score = json.loads((trained / "evaluation.json").read_text())["subnets"][0]["knn"]["20"]
    assert "<th>teacher of step 6, digits: k=20</th>" in page and f"<td>16x1</td><td>{score:.1%}</td>" in page
    assert "<td>method.batch_size</td><td>8</td>" in page
    picture = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split("'")[0])))
    assert picture.size == (5 * 26, 6 * 26)  # 6 images; themselves, 2 global crops and 2 local ones
    assert len(picture.crop((26, 0, 50, 24)).getcolors() or "") > 20


def test_runs_are_compared(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    pretrain(tiny_config(*RUN, "method.seed=1", "data.source=digits"), other)
    capsys.readouterr()
    assert main(["report", str(trained), str(other), str(other)]) == 0  # which are two
    assert capsys.readouterr().out == f"{trained}/comparison.html\n"
    page = (trained / "comparison.html").read_text()
    assert "<h1>run, other</h1>" in page and "<th>run</th><th>other</th>" in page
    assert "<td>method.seed</td><td>0</td><td>1</td>" in page and "method.batch_size" not in page
    for folder in (trained, other):
        loss = [row["loss"] for row in rows(folder) if "loss" in row][-1]
        assert f"<td>{loss:.4f}</td>" in page


def test_runs_of_other_backbones_are_compared(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "swin"
    pretrain(tiny_pyramid("swin"), other)
    assert main(["report", str(trained), str(other)]) == 0
    assert "<h1>run, swin</h1>" in (trained / "comparison.html").read_text()


def test_pages_of_pictures_are_linked_from_wherever_the_report_lies(
    run: Path, trained: Path, tmp_path: Path
) -> None:
    run = run.rename(tmp_path / "first run's")
    (run / "pictures.html").touch()
    (run / "prototypes.html").touch()
    (tmp_path / "pages").mkdir()
    for place in (run, tmp_path / "pages"):
        for runs in ([RunFolder(run)], [RunFolder(run), RunFolder(trained)]):
            write_report(runs, place / "page.html")
            links = re.findall("<a href='([^']+)'>", (place / "page.html").read_text())
            assert [(place / unquote(link)).resolve() for link in links] == [
                run / name for name in ("pictures.html", "prototypes.html")
            ]


def test_images_that_are_gone_are_no_obstacle(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", 12)
    pretrain(tiny_config(*ONE_STEP, f"data.source={images}"), tmp_path / "run")
    shutil.rmtree(images)
    write_report([RunFolder(tmp_path / "run")], tmp_path / "page.html")
    assert "<p>Not shown: data: expected &#x27;digits&#x27;, a folder" in (tmp_path / "page.html").read_text()


def test_alarms_are_on_the_page(tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny_config(*RUN), out)
    RunFolder(out).log({"step": 6, "alarm": "one-hot targets", "figures": "x <1>", "advice": "raise it"})
    write_report([RunFolder(out)], out / "report.html")
    assert (
        "<li>step 6: <b>one-hot targets</b> (x &lt;1&gt;): raise it</li>" in (out / "report.html").read_text()
    )


def test_expected_curves(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    pretrain(tiny_config(*RUN, "run.knn_subnets=16x2,32x1", "method.seed=1"), other)
    record_band([RunFolder(trained), RunFolder(other)], tmp_path / "tiny.json")
    recorded = json.loads((tmp_path / "tiny.json").read_text())
    assert recorded["seeds"] == [0, 1]
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in (trained, other)]
    pairs = list(zip(*losses, strict=True))
    for (step, *band), pair in zip(recorded["band"]["loss"], pairs, strict=True):
        assert band == pytest.approx([min(pair), max(pair)], rel=1e-3), step
    monkeypatch.setattr(report, "EXPECTED", tmp_path)
    monkeypatch.setattr(report, "PRESETS", {"tiny": None})
    monkeypatch.setattr(report, "preset", lambda name: tiny_config("method.seed=7"))
    assert expected_band(tiny_config()) == recorded["band"]
    assert expected_band(tiny_config("method.batch_size=4")) == {}
    write_report([RunFolder(trained)], tmp_path / "report.html")
    assert "fill-opacity: 0.15" in (tmp_path / "report.html").read_text()


def test_recorded_curves_belong_to_presets() -> None:
    """A preset that changes needs its curves again."""
    recorded = sorted(file.stem for file in report.EXPECTED.glob("*.json"))
    assert "quickstart" in recorded
    for name in recorded:
        config = preset(name)
        band = expected_band(replace(config, method=replace(config.method, seed=5)))
        assert {"loss", "target_entropy.0", "feature_std.intact"} <= band.keys()
        assert all(low <= high for points in band.values() for _, low, high in points)
