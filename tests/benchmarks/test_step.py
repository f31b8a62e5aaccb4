"""The step benchmark on a CPU, tiny; the official code where a checkout is named with POA_OFFICIAL."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import profiling, quality, roofline, step
from benchmarks.failures import Refused
from benchmarks.peers.official import OfficialStep
from benchmarks.results import Row
from helpers.tiny import SHORT, tiny_config
from poa.export import extract
from poa.network import Network, StudentPass
from poa.presets import preset
from poa.subnets import Subnet
from poa.tribranch import Centers, teacher_targets, tribranch_loss

CPU = torch.device("cpu")
OFFICIAL = os.environ.get("POA_OFFICIAL")
needs_official = pytest.mark.skipif(
    not OFFICIAL, reason="needs POA_OFFICIAL, a checkout of github.com/alipay/POA"
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the machine without a GPU")


def measured(name: str, official: Path | None = None) -> tuple[list[Row], dict[str, str]]:
    """Rows, and why the other providers have none."""
    events = list(step.run(name, 4, CPU, official, 0.01))
    refused = {event.provider: event.reason for event in events if isinstance(event, Refused)}
    return [event for event in events if isinstance(event, dict)], refused


def test_every_provider_that_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled peer is traced, not compiled to machine code, which takes minutes on a CPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows, refused = measured("vit-l16")
    assert {row["provider"] for row in rows} == {"ours", "reference", "naive", "compiled"}
    assert [row["mode"] for row in rows[:3]] == ["32x2", "48x3", "64x4"]
    for row in rows:
        assert row["op"] == "step"
        assert row["batch"] == 4
        assert row["images_per_s"] == pytest.approx(4e6 / row["p50"])
        assert row["share_of_floor"] > 0
    slicing = {row["mode"]: row["graphs"] for row in rows if row["provider"] == "compiled"}
    assert slicing["48x3"]
    assert "32x2" not in slicing, "compiled for two widths alone"
    assert refused["official"] == "no checkout was named with --official"
    assert refused["graphs"] == "performance.cuda_graphs: expected a cuda device, got run.device cpu"


@pytest.mark.parametrize(("name", "smallest"), [("swin-b", "16x1-1-1"), ("resnet-152", "16x1-1-1")])
def test_other_backbones(name: str, smallest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiled peer, which compiles for minutes on a CPU."""
    monkeypatch.setattr(step, "PROVIDERS", ("ours", "reference", "naive"))
    rows, _ = measured(name)
    assert {row["provider"] for row in rows} == {"ours", "reference", "naive"}
    assert rows[0]["mode"] == smallest
    assert all(row["share_of_floor"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["vit-l16", "swin-b", "resnet-152"])
def test_costs_belong_to_one_family(name: str) -> None:
    method = preset(name).method
    costs = roofline.step(roofline.Workload.of(method, 8), method.backbone.space.smallest)
    for kernel in {cost.kernel for cost in costs}:
        assert sum(bool(re.search(pattern, kernel)) for _, _, pattern in profiling.FAMILIES) == 1, kernel


def test_a_provider_with_another_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import naive

    linear = naive.linear
    monkeypatch.setattr(step, "PROVIDERS", ("ours", "naive"))
    monkeypatch.setattr(naive, "linear", lambda x, *rest: linear(1.2 * x, *rest))
    rows, refused = measured("vit-l16")
    assert {row["provider"] for row in rows} == {"ours"}
    assert refused["naive"].startswith("its loss is")


def test_profile() -> None:
    row = profiling.profile("vit-l16", 4, CPU)
    first, *kernels = row["lines"]
    assert first.endswith(f"in {row['launches']} launches")
    assert len(kernels) == 20
    assert any("of floor" in kernel for kernel in kernels)


def test_parts() -> None:
    parts = list(profiling.parts("vit-l16", 4, CPU, 0.01))
    assert [row["mode"].partition(" ")[2] for row in parts] == [
        "data", "teacher", "intact forward", "elastic forward", "losses", "backward", "update"
    ]  # fmt: skip


def test_quality(capsys: pytest.CaptureFixture[str]) -> None:
    rows = quality.run("quickstart", "digits", CPU, 0.01, None)
    assert {row["mode"] for row in rows} == {"64x4", "32x2"}
    assert [row["images"] for row in rows] == sorted(row["images"] for row in rows)
    assert rows[0]["images"] == 0 < rows[-1]["images"]
    assert all(0 < row["accuracy"] < 1 for row in rows)


def test_quality_from_pretrained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = tiny_config().method.backbone.build(torch.Generator().manual_seed(0))
    source = extract(backbone, backbone.space.intact, tmp_path, tiny_config().method.crops)
    options = [*SHORT, "method.init.images=16", "run.knn_images=60"]
    rows = quality.run("quickstart", "digits", CPU, 0.01, None, str(source), options)
    trained = {row["provider"] for row in rows if row["images"]}
    assert trained == {"ours", "scratch", "alone"}
    begun = {row["provider"]: row["accuracy"] for row in rows if row["mode"] == "32x2" and not row["images"]}
    assert begun.keys() == {"ours", "given order", "random order", "scratch"}
    assert begun["ours"] == begun["given order"] == begun["random order"]  # the same network


@needs_official
def test_official_step_has_our_losses() -> None:
    assert OFFICIAL is not None
    method = tiny_config("method.backbone.drop_path=0.0").method
    setting = step.make_setting(step.config_of("vit-l16", CPU), 4, CPU)
    torch.manual_seed(0)
    official = OfficialStep(Path(OFFICIAL), method, CPU)
    try:
        student, teacher = (Network(method.backbone, method.head) for _ in range(2))
        official.load_into(student)
        official.load_into(teacher, "teacher")
        subnet = Subnet(16, 1)
        theirs = official.total(official.losses(setting.batch, subnet, 0.05))
        centers = Centers.zeros(method.head.prototypes, CPU)
        (targets,) = teacher_targets(teacher, [setting.batch], 0.05, method.loss, centers)
        intact, elastic = student(
            setting.batch, [StudentPass(method.backbone.space.intact), StudentPass(subnet)]
        )
        ours = tribranch_loss(intact, elastic, targets, setting.batch, method.loss)[0].detach()
        assert float(ours) == pytest.approx(theirs, rel=1e-5)
    finally:
        official.close()


@needs_official
def test_official_code_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert OFFICIAL is not None
    rows, _ = measured("vit-l16", Path(OFFICIAL))
    assert "official" in {row["provider"] for row in rows}
    assert "LayerNorm gets device and dtype by name" in capsys.readouterr().out


@needs_official
def test_official_training_follows_ours() -> None:
    """The same weights, batches and subnets give the same accuracies at first."""
    assert OFFICIAL is not None
    rows = quality.run("quickstart", "digits", CPU, 0.02, Path(OFFICIAL))
    first = {(row["provider"], row["mode"]): row["accuracy"] for row in rows if not row["images"]}
    assert first["ours", "64x4"] == first["official", "64x4"]
