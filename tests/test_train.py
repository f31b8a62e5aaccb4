"""The training loop: resuming, precisions, several processes, what it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.run_folders import assert_same, assert_same_run, newest, rows, run_of
from helpers.tiny import ONE_STEP, tiny_config
from poa import step as step_module
from poa.checkpoint import RunFolder
from poa.errors import DivergenceError, InputError
from poa.optim import restore_optimizer
from poa.step import initial_network
from poa.train import Trainer, pretrain


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["method.loss.targets=centering"],
        ["method.precision=fp16"],
        ["performance.workers=2", "method.sampling=balanced"],
    ],
    ids=["sinkhorn", "centering", "fp16", "workers"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(*changes)
    pretrain(config, tmp_path / "whole")
    step = Trainer.step

    def dies(self: Trainer, number: int, *rest: Any, **options: Any) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, tmp_path / "parts")
    assert newest(tmp_path / "parts")["step"] == 3
    assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    pretrain(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "change", ["performance.recompute=true", "performance.workers=2", "performance.optimizer=torch"]
)
def test_performance_options_do_not_change_results(change: str, tmp_path: Path) -> None:
    for name, changes in (("plain", []), ("changed", [change])):
        pretrain(tiny_config("method.backbone.drop_path=0.3", *changes), tmp_path / name)
    plain, changed = (newest(tmp_path / name) for name in ("plain", "changed"))
    assert_same(changed["teacher"], plain["teacher"])
    assert_same(changed["optimizer"]["state"], plain["optimizer"]["state"])
    assert rows(tmp_path / "changed") == rows(tmp_path / "plain")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_agree_on_the_first_losses(precision: str, tmp_path: Path) -> None:
    for name in ("fp32", precision):
        pretrain(tiny_config(f"method.precision={name}"), tmp_path / name)
    exact, rounded = (rows(tmp_path / name)[0]["loss"] for name in ("fp32", precision))
    assert rounded == pytest.approx(exact, rel=1e-2)
    network = RunFolder(tmp_path / precision).network("student")[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_half_precision_prototypes_agree_on_the_losses(targets: str, tmp_path: Path) -> None:
    for name in ("fp32", "fp16"):
        changes = [f"method.loss.operands={name}", f"method.loss.targets={targets}"]
        pretrain(tiny_config(*changes), tmp_path / name)
    exact, rounded = (rows(tmp_path / name)[0]["loss"] for name in ("fp32", "fp16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-3)


def test_metrics_and_evaluation_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny_config("run.evaluate_every=3", "run.knn_images=60"), tmp_path / "run")
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3, 4, 5, 6]
    scores = [row for row in logged if "knn" in row]
    assert [row["step"] for row in scores] == [0, 3, 6]
    assert set(scores[0]["knn"]) == {"k", "teacher 32x2", "teacher 16x1", "student 32x2"}
    first = logged[1]
    assert {"intact.dino.0", "elastic.distill.1", "koleo", "lr", "grad_norm.backbone"} <= first.keys()
    assert all(row["intact.ibot.0"] == 0 for row in logged if row.get("step", 0) in (1, 2) and "loss" in row)
    assert logged[-2]["intact.ibot.0"] > 0
    printed = capsys.readouterr().out
    assert "step 6/6  loss" in printed
    assert "data wait" in printed


def test_prototypes_are_frozen_at_first(tmp_path: Path) -> None:
    pretrain(tiny_config(*ONE_STEP), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    student, teacher = (folder.network(branch)[0] for branch in ("student", "teacher"))
    start = dict(initial_network(folder.config()).named_parameters())
    for name, parameter in student.named_parameters():
        unchanged = ".prototypes." in name or name == "backbone.mask_token"  # no masks yet
        assert torch.equal(parameter, start[name]) == unchanged, name
    assert not torch.equal(teacher.backbone.cls_token, student.backbone.cls_token)


def poison(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Gradients that are NaN in these steps."""
    step = Trainer.step

    def poisoned(self: Trainer, number: int, *rest: Any, **options: Any) -> Any:
        parameter = next(self.state.student.parameters())
        handle = parameter.register_hook(lambda grad: grad * torch.nan) if number in steps else None
        before = parameter.detach().clone()
        report = step(self, number, *rest, **options)
        if handle:
            handle.remove()
            assert torch.equal(parameter, before)
        assert report.values["loss"].isfinite() and bool(report.finite) == (number not in steps)
        return report

    monkeypatch.setattr(Trainer, "step", poisoned)


@pytest.mark.parametrize("optimizer", ["fused", "torch"])
def test_a_step_without_numbers_is_skipped_and_counted(
    optimizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    poison(monkeypatch, range(3, 4))
    pretrain(tiny_config(f"performance.optimizer={optimizer}"), tmp_path / "run")
    logged = rows(tmp_path / "run")
    assert [row["skipped"] for row in logged] == [0, 0, 0, 1, 0, 0]
    assert [row["skipped_steps"] for row in logged] == [0, 0, 0, 1, 1, 1]
    assert logged[3]["loss"] > 0 and logged[3]["grad_norm.backbone"] is None
    assert "skipped 100%" in capsys.readouterr().out
    assert caplog.messages[-1].startswith("1 of 6 steps were skipped")
    assert all(p.isfinite().all() for p in newest(tmp_path / "run")["teacher"].values())


def test_a_run_that_skips_on_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(2, 6))
    message = (
        r"step 5: the last 3 steps were skipped.* since step 3; .* no loss on any rank, only gradients.* "
        "lower method.optim.base_lr"
    )
    with pytest.raises(DivergenceError, match=message):
        pretrain(tiny_config("run.skip_limit=3"), tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 3  # saving goes on while steps are skipped
    assert newest(tmp_path / "run")["skipped"] == [1, 1, 3]


def test_the_loss_that_is_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step_module.tribranch_loss

    def spoiled(*inputs: Any) -> Any:
        total, terms = whole(*inputs)
        return total * torch.nan, terms | {"elastic.ibot.1": total.detach() * torch.nan}

    monkeypatch.setattr(step_module, "tribranch_loss", spoiled)
    with pytest.raises(DivergenceError, match="since step 1; .*: rank 0: loss, elastic.ibot.1. Weights"):
        pretrain(tiny_config("run.skip_limit=2"), tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the gradients are finite."""
    step = Trainer.step

    def infinite(self: Trainer, *inputs: Any, **options: Any) -> Any:
        report = step(self, *inputs, **options)
        return replace(report, values=report.values | {"loss": torch.tensor(float("inf"))})

    monkeypatch.setattr(Trainer, "step", infinite)
    with pytest.raises(DivergenceError, match="step 1: the loss is NaN or inf, though gradients are finite"):
        pretrain(tiny_config(), tmp_path / "run")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_not_saved_over_good_ones(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though gradients were finite."""
    step = Trainer.step

    def broken(self: Trainer, number: int, *rest: Any, **options: Any) -> Any:
        report = step(self, number, *rest, **options)
        if number == 5:
            next(self.state.teacher.parameters())[0] = value
        return report

    monkeypatch.setattr(Trainer, "step", broken)
    message = (
        "step 6: weights are NaN or inf, .* no checkpoint was saved, that of step 3 is the newest; lower"
    )
    with pytest.raises(DivergenceError, match=message):
        pretrain(tiny_config(), tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("kinds", [("torch", "fused"), ("fused", "torch")])
def test_a_run_goes_on_with_another_optimizer(kinds: tuple[str, str], tmp_path: Path) -> None:
    config = tiny_config()
    pretrain(config, tmp_path / "whole")
    start, rest = (tiny_config(f"performance.optimizer={kind}") for kind in kinds)
    run = run_of(start, tmp_path / "parts")
    run.begin()
    for step, canvases in zip(range(3), run.batches(range(3)), strict=True):
        run.step(step, canvases)
    run.save(3)
    pretrain(rest, tmp_path / "parts", resume=True)
    whole, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert_same(parts["student"], whole["student"])


def test_the_state_of_apexs_optimizer_is_refused(tmp_path: Path) -> None:
    optimizer = run_of(tiny_config(), tmp_path).state.optimizer
    state = optimizer.state_dict()
    state["param_groups"] = [group | {"bias_correction": True} for group in state["param_groups"]]
    with pytest.raises(InputError, match="checkpoint.pt: expected the state of PyTorch's or the fused"):
        restore_optimizer(optimizer, state, "checkpoint.pt")


def test_fewer_images_than_a_batch(tmp_path: Path) -> None:
    few = ["data.holdout=0.997", "method.optim.epoch_steps=none", "method.batch_size=16"]
    pretrain(tiny_config(*few), tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 3
