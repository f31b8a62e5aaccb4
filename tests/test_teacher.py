"""Runs with another, frozen teacher, of any width and input size; they resume with no other one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.tiny import OVERRIDES, tiny_config, tiny_pyramid
from poa.__main__ import main
from poa.checkpoint import RunFolder, read_checkpoint
from poa.config import with_teacher
from poa.errors import InputError
from poa.export import extract
from poa.flops import expected_masked, micro_batch_flops
from poa.initialization import frozen_teacher
from poa.memory import predict_memory
from poa.options import override
from poa.subnets import Subnet
from poa.train import pretrain

LARGER = [
    "max_width=48",
    "max_depth=3",
    "patch_size=4",
    "image_size=16",
    "global_size=16",
    "mean=0.5,0.4,0.3",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `vit-48x3`, wider than the student and of other images, and `resnet-32x1-2-2`."""
    folder = tmp_path_factory.mktemp("models")
    for config in (tiny_config(*LARGER), tiny_pyramid("resnet")):
        backbone = config.method.backbone.build(torch.Generator().manual_seed(0))
        extract(backbone, backbone.space.intact, folder, config.method.crops)
    return folder


@pytest.mark.parametrize(("name", "width"), [("vit-48x3", 48), ("resnet-32x1-2-2", 256)])
def test_it_sees_what_it_was_trained_on(name: str, width: int, models: Path) -> None:
    method = with_teacher(tiny_config(), str(models / name)).method
    teacher = frozen_teacher(method)
    assert teacher and str(teacher).endswith(f"; frozen, on crops of {teacher.size} pixels")
    size, (mean, std) = teacher.size, teacher.source.normalisation or ((), ())
    pixels = torch.rand(2, 3, size, size)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    seen = teacher(normalised(method.crops.mean, method.crops.std))
    (expected,) = teacher.source.backbone([normalised(mean, std)])
    torch.testing.assert_close(seen, expected.cls.detach(), rtol=0, atol=1e-5)
    assert teacher(torch.randn(4, 3, 24, 24, dtype=torch.bfloat16)).shape == (4, width)
    config, weights = tiny_config("features=1"), sum(p.numel() for p in teacher.backbone.parameters())
    taught = predict_memory(with_teacher(config, str(models / name))).fixed - predict_memory(config).fixed
    assert 4 * weights <= taught <= 8 * weights + 100_000  # in blocks of an allocator
    larger = replace(method.teacher, frozen_size=2 * size)
    other = frozen_teacher(replace(method, teacher=larger))
    assert other and (other.size, other(pixels).shape) == (2 * size, (2, width))


def test_a_run_resumes_with_it_and_with_no_other(models: Path, tmp_path: Path) -> None:
    source, out = shutil.copytree(models / "vit-48x3", tmp_path / "large"), tmp_path / "run"
    start = ["pretrain", "--preset", "quickstart", "--teacher", str(source), "--out", str(out), *OVERRIDES]
    assert main([*start, "method.teacher.frozen_size=32"]) == 0
    folder = RunFolder(out)
    config = folder.config()
    assert config.method.loss.features == 1 and all(row["features"] > 0 for row in folder.rows())
    method, (*_, row), teacher = config.method, folder.rows(), frozen_teacher(config.method)
    assert teacher and len(row["subnets"]) == 1
    elastic, masked = Subnet.parse(*row["subnets"]), expected_masked(method)
    flops = micro_batch_flops(method, elastic, masked) + 2 * method.batch_size * teacher.flops
    of_image = row["tflop_per_s"] * 1e12 / row["images_per_s"]
    assert of_image == pytest.approx(flops / method.batch_size, rel=1e-6)
    whole = read_checkpoint(folder.newest().path)
    folder.newest().path.unlink()
    assert main(["pretrain", "--resume", str(out)]) == 0
    again = read_checkpoint(folder.newest().path)
    for branch in ("student", "teacher"):
        assert all(torch.equal(again[branch][name], tensor) for name, tensor in whole[branch].items())
    with pytest.raises(InputError, match=r"method.teacher.frozen: other against .*large in the checkpoint"):
        pretrain(override(config, {"method.teacher.frozen": "other"}), out, resume=True)
    shutil.rmtree(source)
    shutil.copytree(models / "resnet-32x1-2-2", source)
    with pytest.raises(InputError, match="expected the frozen teacher of digest .* whose weights are others"):
        pretrain(config, out, resume=True)


def test_similarities_alone_train_no_heads(models: Path, tmp_path: Path) -> None:
    """The loss is feature distillation and KoLeo; the backbone learns, heads get no gradient."""
    off = ["loss.dino=0", "loss.ibot=0", "loss.distill=0", "koleo=0.1"]
    pretrain(with_teacher(tiny_config(*off), str(models / "vit-48x3")), tmp_path)
    for row in RunFolder(tmp_path).rows():
        assert row["loss"] == pytest.approx(row["features"] + 0.1 * row["koleo"], rel=1e-4)
        assert row["grad_norm.backbone"] > 0 == row["grad_norm.head"]


def test_wrong_teachers(models: Path, tmp_path: Path) -> None:
    wrong: list[tuple[str, list[str], str]] = [
        (
            "vit-48x3",
            ["frozen_size=18"],
            "method.teacher.frozen_size: image size: expected a multiple of .* 18",
        ),
        (
            "vit-48x3",
            ["channels=1", "mean=0.3", "std=0.3"],
            "vit-48x3: expected a teacher .* 1 channels, got",
        ),
        ("nothing", [], "nothing: expected a file of weights, got no such file"),
        ("vit-48x3", ["features=0"], "loss.features: expected a weight above 0 with method.teacher.frozen"),
    ]
    for name, options, reason in wrong:
        with pytest.raises(InputError, match=reason) as error:
            pretrain(override(with_teacher(tiny_config(), str(models / name)), options), tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
