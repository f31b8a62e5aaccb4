"""Fine-tuning: one elastic run, single subnets, and models with their heads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import poa
from helpers.collections_of_images import write_folder
from helpers.commands import fails
from helpers.run_folders import assert_same, newest
from helpers.tiny import OVERRIDES
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.data.sources import open_data
from poa.distributed import World
from poa.errors import InputError, Preempted
from poa.export.formats import onnx_runner
from poa.finetune import FinetuneConfig
from poa.finetune.images import mixed, stratified
from poa.finetune.train import Trainer, resume, sandwich_losses
from poa.options import from_dict
from poa.signals import StopSignals
from poa.subnets import Subnet

CPU = torch.device("cpu")
INT8 = ["--format", "onnx", "--dtype", "int8"]
SHORT = ["epochs=1.5", "warmup_epochs=0.5", "evaluate_every=0.5", "flip=0", "--share", "0.1", "mixup=0.8"]


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert main(["finetune", str(trained), "--out", str(out), *SHORT]) == 0
    return out


def test_all_subnets_have_classifiers_that_are_scored_and_extracted(
    tuned: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["evaluate", str(tuned), "--plot", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().out
    assert "top1: accuracy of the fine-tuned classifier" in said and (tmp_path / "a.png").exists()
    rows = json.loads((tuned / "evaluation.json").read_text())["subnets"]
    assert len(rows) == 4 and all(0 <= row["top1"]["top1"] <= row["top1"]["top5"] <= 1 for row in rows)
    assert main(["extract", str(tuned), "--subnets", "16x1", "--out", str(tmp_path)]) == 0
    model, images = poa.load(tmp_path / "vit-16x1"), torch.randn(3, 3, 24, 24)
    network, _ = RunFolder(tuned).network()
    with torch.no_grad():
        expected = network.logits(images, Subnet(16, 1))  # type: ignore[operator, union-attr]
        torch.testing.assert_close(model.classify(images), expected, atol=1e-5, rtol=0)
    assert model.classes == [str(i) for i in range(10)]
    about = json.loads((tmp_path / "vit-16x1/config.json").read_text())
    assert about["num_classes"] == 10 and about["label_names"] == model.classes
    card = (tmp_path / "vit-16x1/README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "digits: top-1 |" in card
    assert "| fine-tuning | 1.5 epochs of 64 images a step and rank, 10% of the labels |" in card
    assert "--initial: expected a run of pre-training" in fails(
        capsys, "evaluate", str(tuned), "--initial", "--out", str(tmp_path / "e.json")
    )


def test_programs_classify(tuned: Path, tmp_path: Path) -> None:
    command = ["extract", str(tuned), "--subnets", "16x1", "--out", str(tmp_path), "--format", "pt2"]
    assert main(command) == 0
    model, images = poa.load(tmp_path / "vit-16x1"), torch.randn(3, 3, 24, 24)
    program = torch.export.load(tmp_path / "vit-16x1/model.pt2", extra_files=(extra := {"classes": ""}))
    assert json.loads(extra["classes"]) == model.classes
    with torch.no_grad():
        features, logits = program.module()(images)
        torch.testing.assert_close(features, model(images))
        torch.testing.assert_close(logits, model.classify(images))


def test_int8_files_classify(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    command = ["extract", str(tuned), "--subnets", "32x2", "--out", str(tmp_path), *INT8]
    assert main(command) == 0
    path = tmp_path / "vit-32x2/model.int8.onnx"
    metadata = {entry.key: entry.value for entry in importlib.import_module("onnx").load(path).metadata_props}
    model, images = poa.load(path.parent), torch.randn(3, 3, 24, 24)
    scores = json.loads(metadata["top1"])
    accuracies = f"{scores['int8']:.1%} in int8, {scores['fp32']:.1%} in fp32"
    assert f"{path}: top-1 accuracy {accuracies}\n" in capsys.readouterr().out
    assert json.loads(metadata["classes"]) == model.classes
    with torch.no_grad():
        wanted, got = model.classify(images), onnx_runner(path)(images)[1]
    assert 0 < float((got - wanted).abs().max()) < 0.2 * float(wanted.abs().max())


def test_timm_reads_the_head(tuned: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = poa.load(tuned, "32x2")
    model.save(tmp_path / "model")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(theirs(images), model.classify(images))
        assert torch.equal(model.to_timm()(images), model.classify(images))


def stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    received = property(lambda _: "SIGTERM", lambda *_: None)
    monkeypatch.setattr(StopSignals, "received", received, raising=False)


def test_a_run_that_was_stopped_resumes_exactly(
    tuned: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails(capsys, "pretrain", "--resume", str(tuned)).count("got one of fine-tuning") == 1
    stop_at_once(monkeypatch)
    out = tmp_path / "stopped"
    assert main(["finetune", str(trained), "--out", str(out), *SHORT]) != 0
    assert "resume with: poa finetune --resume" in capsys.readouterr().err
    single = ["--out", str(tmp_path / "single"), "--subnets", "16x2", "16x1", "32x2"]
    assert main(["finetune", str(trained), *single, *SHORT]) != 0
    assert capsys.readouterr().err.rstrip().endswith("single/16x2; not begun: 16x1, 32x2")
    monkeypatch.undo()
    assert newest(out)["step"] == 1
    resume(out)
    a, b = newest(out), newest(tuned)
    assert_same(a["teacher"], b["teacher"])
    assert_same(a["optimizer"], b["optimizer"])
    assert a["best"] == b["best"]


def test_what_does_not_fit_a_run_is_refused(
    tuned: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for given in (["--data", "digits"], ["--subnets", "16x1"], ["--step", "1"], ["--share", "1"], ["lr=1"]):
        assert "--resume: expected nothing else" in fails(capsys, "finetune", "--resume", str(tuned), *given)
    write_folder(tmp_path / "images", 12)
    line = fails(capsys, "evaluate", str(tuned), "--data", str(tmp_path / "images"))
    assert "expected the 10 classes of the model (0, 1, 2, ...), got 3 others (cat, dog, owl, ...)" in line
    with pytest.raises(InputError, match="expected 1 ranks, got 2"):
        folder = RunFolder(tuned)
        content = folder.load(folder.newest(), folder.config(), format=None)
        options = from_dict(FinetuneConfig, content["finetune"])
        Trainer(folder.config(), options, folder, folder.config().open(), World(0, 2, CPU), content)
    step = Trainer.step

    def broken(self: Trainer, number: int, *rest: Any) -> Any:
        report = step(self, number, *rest)
        next(self.teacher.parameters())[0] = torch.nan
        return report

    monkeypatch.setattr(Trainer, "step", broken)
    assert main(["finetune", str(trained), "--out", str(tmp_path / "nan"), *SHORT]) == 1
    assert "no checkpoint was saved, there is none yet; lower lr" in capsys.readouterr().err
    said = "--init: expected a run of pre-training, got"
    assert said in fails(capsys, "pretrain", "--init", str(tuned), "--check", *OVERRIDES)


def test_a_dataset_from_python(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8)
    dataset = TensorDataset(images, torch.arange(40) % 4)
    given: dict[str, Any] = {"subnet": "16x1", "epochs": 2, "warmup_epochs": 0.5}
    run = poa.Run(trained).finetune(tmp_path / "run", dataset, **given)
    assert run.models()[0]["subnet"] == "16x1"
    assert run.subnet().classes == ["0", "1", "2", "3"]
    assert "top1" in repr(run.evaluate(device="cpu"))
    stop_at_once(monkeypatch)
    with pytest.raises(Preempted, match="step 1: stopped"):
        poa.Run(trained).finetune(tmp_path / "stopped", dataset, **given)
    monkeypatch.undo()
    with pytest.raises(InputError, match="with options, got one of fine-tuning"):
        poa.Run(tmp_path / "stopped", dataset).resume(epochs=2)
    poa.Run(tmp_path / "stopped").resume(dataset)
    assert_same(newest(tmp_path / "stopped")["teacher"], newest(run.folder.path)["teacher"])


def test_one_subnet_alone(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["finetune", str(trained), "--out", str(tmp_path), "--subnets", "16x2", *SHORT]
    assert main(run) == 0
    assert [str(s) for s in RunFolder(tmp_path / "16x2").config().method.backbone.space] == ["16x2"]
    assert poa.load(tmp_path / "16x2").classes[:2] == ["0", "1"]
    assert "expected a new folder" in fails(capsys, *run)
    assert "expected RUN and --out" in fails(capsys, "finetune", str(trained))
    assert "--recipe: expected one of short, " in fails(capsys, *run, "--recipe", "none")
    assert "finetune.share: expected a value in (0, 1]" in fails(capsys, *run, "--share", "0")


def test_a_seed_of_its_own(trained: Path, tuned: Path, tmp_path: Path) -> None:
    """Draws other images and crops; by default it is the run's, 0."""
    for seed in (0, 1):
        assert (
            main(["finetune", str(trained), "--out", str(tmp_path / f"{seed}"), *SHORT, f"seed={seed}"]) == 0
        )
    kept, other = (newest(tmp_path / name)["student"] for name in ("0", "1"))
    assert_same(kept, newest(tuned)["student"])
    assert not torch.equal(kept["head.weight"], other["head.weight"])


def test_losses_of_a_sandwich() -> None:
    """The largest learns from the targets, the others from its output, which gets no gradient from them."""
    logits = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    targets = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    losses = sandwich_losses(logits, targets, 0.75)
    taught = 0.75 * logits[0].detach().softmax(1) + 0.25 * targets
    for loss, x, y in zip(losses, logits, (targets, taught, taught), strict=True):
        torch.testing.assert_close(loss, -(y * x.log_softmax(1)).sum(1).mean())
    (gradient,) = torch.autograd.grad(losses[1:].sum(), logits[0], allow_unused=True)
    assert gradient is None or not gradient.any()


def test_mixing_keeps_the_shares_of_images_and_labels() -> None:
    """A pixel of an image of ones and zeros is the label's share of it, of mixup everywhere and of CutMix in
    the mean."""
    labels = torch.tensor([1, 1, 0, 0])
    images = labels.float()[:, None, None, None].expand(4, 3, 16, 16)
    for name, spread in (("mixup", False), ("cutmix", True)):
        options, different = FinetuneConfig(smoothing=0.0, **{name: 1.0}), 0
        for seed in range(20):
            x, y = mixed(images, labels, 2, options, torch.Generator().manual_seed(seed))
            torch.testing.assert_close(x.mean((1, 2, 3)), y[:, 1])
            torch.testing.assert_close(y.sum(1), torch.ones(4))
            different += bool(((x > 0) & (x < 1)).any()) != spread and bool((y != y.round()).any())
        assert different > 5, name
    _, smooth = mixed(images, labels, 2, FinetuneConfig(smoothing=0.2), torch.Generator())
    torch.testing.assert_close(smooth[0], torch.tensor([0.1, 0.9]))


def test_a_share_is_stratified() -> None:
    train = open_data("digits", 0.25, 0).train
    few, others = (stratified(train, 0.1, seed) for seed in (0, 1))
    assert few.labels is not None and train.labels is not None
    whole = np.bincount(train.labels)
    assert (np.bincount(few.labels) == np.round(0.1 * whole)).all()
    assert not np.array_equal(few.positions, others.positions)
    assert (np.bincount(stratified(train, 1e-6, 0).labels) == 1).all()
