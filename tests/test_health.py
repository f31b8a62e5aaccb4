"""Alarms: raised by collapsed runs, not by healthy ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.tiny import tiny_config
from poa.checkpoint import RunFolder
from poa.health import ALARMS, LOOKS, STEPS, Watch, observe
from poa.losses import SoftTargets
from poa.network import StudentOutput
from poa.options import override
from poa.presets import preset
from poa.train import pretrain
from poa.tribranch import Targets

HEALTHY = {
    "target_entropy.0": 0.6,
    "target_spread.0": 9.0,
    "feature_std.intact": 0.7,
    "feature_std.elastic": 0.6,
}

HUNDRED_STEPS = [
    "method.batch_size=32",
    "method.crops.local_count=2",
    "method.loss.ibot=0",
    "method.optim.epoch_steps=20",
    "method.optim.epochs=5",
    "method.optim.warmup_epochs=1",
    "run.evaluate_every=0",
    "run.device=cpu",
]
"""Of the demonstration, with fewer images."""


def alarms(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["alarm"]) for row in RunFolder(folder).rows() if "alarm" in row]


def seen(logits: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    target = SoftTargets(logits, torch.zeros(logits.shape[1]), 0.1)
    student = StudentOutput([], [], torch.cat([tokens, torch.zeros_like(tokens)]))
    return {k: float(v) for k, v in observe(Targets([target], []), [student, student]).items()}


def test_figures_of_extremes() -> None:
    tokens = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    uniform = seen(torch.zeros(64, 32), tokens)
    assert uniform["target_entropy.0"] == pytest.approx(1) and uniform["prototypes_used.0"] == 1 / 32
    assert uniform["target_spread.0"] == pytest.approx(32)
    one_hot = seen(1000 * torch.eye(32).repeat(2, 1), tokens)
    assert one_hot["target_spread.0"] == 1 and one_hot["prototypes_used.0"] == 1
    assert uniform["feature_std.intact"] == pytest.approx(1, abs=0.05)
    alike = seen(torch.randn(64, 32), torch.ones(64, 16))
    assert alike["feature_std.elastic"] < 1e-6


@pytest.mark.parametrize(
    ("name", "figure", "value"),
    [
        ("uniform targets", "target_entropy.0", 0.999),
        ("one-hot targets", "target_spread.0", 1.3),
        ("collapsed features", "feature_std.elastic", 0.01),
    ],
)
def test_an_alarm_is_raised_once(name: str, figure: str, value: float) -> None:
    watch = Watch(8, 0)
    bad = HEALTHY | {figure: value}
    raised = {step: watch.look(step, bad) for step in range(10, 200, 10)}
    first = 10 + max(STEPS, 10 * (LOOKS - 1))
    assert [(step, alarm.name) for step, alarms in raised.items() for alarm, _ in alarms] == [(first, name)]
    assert figure in raised[first][0][1]
    assert watch.look(200, HEALTHY) == []
    again = {step: watch.look(step, bad) for step in range(210, 300, 10)}
    assert [step for step, alarms in again.items() if alarms] == [first + 200]


def test_seldom_looks_need_as_many() -> None:
    watch = Watch(8, 0)
    bad = HEALTHY | {"target_entropy.0": 1.0}
    assert [bool(watch.look(step, bad)) for step in (100, 200, 300, 400)] == [False, False, True, False]


def test_its_state_is_kept() -> None:
    watch, other = Watch(8, 0), Watch(8, 0)
    bad = HEALTHY | {"target_entropy.0": 1.0}
    for step in (0, 20):
        watch.look(step, bad)
    other.load_state_dict(watch.state_dict())
    assert [a.name for a, _ in other.look(40, bad)] == ["uniform targets"]


def test_one_image_has_no_deviation() -> None:
    watch = Watch(1, 0)
    assert not any(watch.look(step, HEALTHY | {"feature_std.intact": 0.0}) for step in range(0, 200, 20))


@pytest.mark.parametrize(
    ("temperature", "expected"), [(50.0, "uniform targets"), (0.0005, "one-hot targets")], ids=["hot", "cold"]
)
def test_a_wrong_temperature_raises_its_alarm(
    temperature: float, expected: str, tmp_path: Path, capsys: Any
) -> None:
    """The demonstration's run with another temperature, within 100 steps."""
    names = ("teacher_temperature", "teacher_temperature_start")
    changes = [f"method.optim.{name}={temperature}" for name in names]
    pretrain(override(preset("quickstart"), [*changes, *HUNDRED_STEPS]), tmp_path / "run")
    raised = alarms(tmp_path / "run")
    assert expected in [name for _, name in raised]
    assert min(step for step, name in raised if name == expected) <= 100
    (advice,) = {alarm.advice for alarm in ALARMS if alarm.name == expected}
    assert f"ALARM: {expected} (" in (printed := capsys.readouterr().out) and advice in printed


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_a_healthy_run_raises_none(targets: str, tmp_path: Path) -> None:
    """The beginning of the demonstration's run, as long as wrong temperatures need to raise theirs."""
    changes = [*HUNDRED_STEPS, f"method.loss.targets={targets}"]
    pretrain(override(preset("quickstart"), changes), tmp_path / "run")
    assert alarms(tmp_path / "run") == []


def test_images_that_are_all_alike_raise_an_alarm(tmp_path: Path) -> None:
    for i in range(8):
        Image.new("RGB", (32, 32), (90, 60, 30)).save(tmp_path / f"{i}.png")
    changes = ["method.crops.jitter=0", "method.crops.rotation=0", "method.backbone.drop_path=0"]
    changes += ["method.loss.ibot=0"]  # masks make images differ
    options = [f"data.source={tmp_path}", "method.optim.epochs=50"]
    pretrain(tiny_config(*changes, *options), tmp_path / "run")
    raised = alarms(tmp_path / "run")
    assert min(step for step, name in raised if name == "collapsed features") <= 100


def test_nothing_is_judged_before_the_warm_up_ends() -> None:
    watch = Watch(8, start=100)
    bad = HEALTHY | {"feature_std.intact": 0.0}
    raised = [step for step in range(10, 300, 10) if watch.look(step, bad)]
    assert raised == [100 + STEPS]
