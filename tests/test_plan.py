"""What a run says before its first step and after its last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.tiny import tiny_config
from poa.__main__ import main
from poa.config import Config
from poa.data.sources import open_data
from poa.distributed import World
from poa.options import override
from poa.plan import Plan, first_lines, last_lines
from poa.presets import preset
from poa.train import pretrain

CPU = torch.device("cpu")


def said(config: Config, size: int = 1) -> list[str]:
    data = open_data("digits", config.data.holdout, 0)
    plan = Plan.of(config, len(data.train), size)
    return list(first_lines(config, plan, plan.schedules(config), data, World(0, size, CPU)))


def test_the_lines_of_the_quickstart() -> None:
    torch.set_num_threads(1)
    assert said(preset("quickstart")) == [
        "device: CPU, 1 thread, fp32 products",
        "data: 1,347 images of digits to train on in 10 classes (0, 1, 2, ...), labels from scikit-learn; "
        "450 held out for k-NN",
        "network: 9 subnets from 32x2 to 64x4 of a vit, 32,128 to 213,632 parameters",
        "steps: 1,575 of 64 images, 75 epochs of 21 steps",
        "phases: learning rate rises until step 158, prototypes train from step 32, "
        "masked patches (iBOT) from step 315",
        "note: 1,575 steps are more than the 1,347 images",
    ]


def test_several_ranks() -> None:
    lines = said(override(preset("quickstart"), ["method.micro_batches=6"]), size=2)
    assert lines[3] == "steps: 225 of 384 images (6 micro-batches over 2 ranks), 75 epochs of 3 steps"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ([], "a GPU is expected for bf16 products; for a CPU there are the presets quickstart and small-im"),
        (["method.batch_size=2048"], "1,347 images are fewer than the 2,048 of a step: images repeat within"),
        (
            ["method.optim.epoch_steps=100"],
            "an epoch (method.optim.epoch_steps=100) sees each image 4.75 times",
        ),
        (["method.canvas=32"], "images are shrunk to 32 pixels (method.canvas), less than the crops' 224"),
        (["method.loss.ibot=0"], "the masked-patch loss is off (method.loss.ibot=0)"),
        (["method.masks.probability=0"], "no patch will be masked (method.masks), so that the masked-patch"),
        (
            ["run.evaluate_every=999999"],
            "k-NN runs only before the first step and after the last: run.evaluate_every=999999",
        ),
        (
            ["method.optim.epoch_steps=1", "method.optim.freeze_last_layer_epochs=299.9"],
            "prototypes are never trained: method.optim.freeze_last_layer_epochs lasts for the whole run",
        ),
    ],
)
def test_what_is_unusual_is_said(changes: list[str], note: str) -> None:
    lines = said(override(preset("vit-s16"), changes))
    assert any(line.startswith(f"note: {note}") for line in lines), lines


def test_without_held_out_images_no_accuracy_is_announced() -> None:
    lines = said(override(preset("vit-s16"), ["data.holdout=0", "run.evaluate_every=999999"]))
    assert any("there are no held-out images" in line for line in lines)
    assert not any("k-NN runs" in line for line in lines)


def test_check_says_it_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "--check", "--preset", "vit-s16", "--out", str(out), "run.device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device: CPU") and "note: a GPU is expected" in lines[5]
    assert not out.exists()


def test_the_last_lines_name_what_can_be_done_next() -> None:
    data = open_data("digits", 0.25, 0)
    assert list(last_lines(Path("runs/my run"), 3723.4, data)) == [
        "done in 1:02:03: 'runs/my run'",
        "next: poa report 'runs/my run'",
        "      poa evaluate 'runs/my run'",
        "      poa extract 'runs/my run' --subnets all",
    ]


def test_a_run_begins_and_ends_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny_config(), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:5]] == ["device", "data", "network", "steps", "phases"]
    assert lines[-4].startswith("done in 0:00:") and lines[-1].endswith("--subnets all")
