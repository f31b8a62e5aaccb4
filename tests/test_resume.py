"""Runs that die and go on, and the folder they live in."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import processes
from helpers.collections_of_images import write_folder
from helpers.kill_repeatedly import OPTIONS
from helpers.run_folders import assert_same_run, newest, rows
from helpers.tiny import OVERRIDES, tiny_config
from poa.__main__ import main
from poa.checkpoint import Checkpoint, RunFolder
from poa.errors import InputError, SaveError
from poa.export import load
from poa.files import open_regular
from poa.optim import Schedules
from poa.options import override, to_dict
from poa.signals import StopSignals
from poa.step import TrainingState
from poa.train import Trainer, pretrain


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    pretrain(tiny_config(*OPTIONS), out)
    return out


def test_killed_ten_times(uninterrupted: Path, tmp_path: Path) -> None:
    """At random steps, within a save, between a save and what follows, within a line of metrics."""
    out = tmp_path / "run"
    ((_, printed, _),) = processes.run(1, str(processes.HELPERS / "kill_repeatedly.py"), str(out), "0")
    assert printed.count("killed: ") == 10, printed
    assert {"killed: write", "killed: step"} <= {line.rpartition(" ")[0] for line in printed.splitlines()}
    assert_same_run(out, uninterrupted)
    assert not list(out.glob("**/*.partial"))


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_newest_checkpoint_falls_back(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(tiny_config("run.save_every=2"), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    expected, logged = newest(folder.path), rows(folder.path)
    assert [c.step for c in folder.checkpoints()] == [4, 6]
    path = folder.checkpoints()[-1].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    caplog.set_level(logging.WARNING)
    pretrain(folder.config(), folder.path, resume=True)
    assert f"{path} is damaged: expected checksum {path.stem[9:]}, got " in caplog.text
    assert "using the checkpoint of step 4" in caplog.text
    assert [c.step for c in folder.checkpoints()] == [4, 6]
    torch.testing.assert_close(newest(folder.path)["teacher"], expected["teacher"], rtol=0, atol=0)
    assert rows(folder.path) == logged
    assert path.with_suffix(".damaged").exists()  # nothing is thrown away


def test_nothing_whole_to_go_on_from(tmp_path: Path) -> None:
    pretrain(tiny_config(), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for checkpoint in folder.checkpoints():
        checkpoint.path.write_bytes(b"")
    with pytest.raises(InputError, match="expected a checkpoint, got .*00000006.* is damaged.*00000003"):
        pretrain(folder.config(), folder.path, resume=True)


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    pretrain(tiny_config("run.save_every=1", "run.keep_last=2", "run.keep_every=3"), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert [c.step for c in folder.checkpoints()] == [3, 5, 6]
    assert folder.newest().step == 6
    assert folder.network(step=3)[1].step == 3
    with pytest.raises(InputError, match="a checkpoint of step 4, got checkpoints of steps: 3, 5, 6"):
        folder.network(step=4)


def test_a_milestone_is_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny_config("run.save_every=2", "run.keep_last=3"), tmp_path / "run")
    arguments = ["extract", str(tmp_path / "run"), "--subnets", "16x1", "--step", "2"]
    assert main(arguments) == 0
    assert "00000002-" in load(tmp_path / "run" / "models" / "vit-16x1").info["source"]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save = RunFolder.save

    def fails_later(self: RunFolder, state: Any, config: Any) -> None:
        if state["step"] == 4:
            monkeypatch.setattr(os, "fsync", full)
        save(self, state, config)

    monkeypatch.setattr(RunFolder, "save", fails_later)
    with pytest.raises(SaveError, match="step 4.*not written.*No space left.*step 2 is the newest"):
        pretrain(tiny_config("run.save_every=2"), tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("**/*.partial"))


def test_a_checkpoint_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "00000006-0123456789abcdef.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="expected a checkpoint, got .*f.pt is a link to nothing"):
        RunFolder(tmp_path).newest()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_asks_to_be_queued_again(
    number: signal.Signals,
    code: int,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    out, step = tmp_path / "a run", Trainer.step

    def asked(self: Trainer, index: int, *rest: Any, **options: Any) -> Any:
        if index == 7:
            os.kill(os.getpid(), number)
        return step(self, index, *rest, **options)

    (tmp_path / "c.json").write_text(json.dumps(to_dict(tiny_config(*OPTIONS))))
    arguments = ["pretrain", "--auto-resume", "--config", str(tmp_path / "c.json"), "--out", str(out)]
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup; a run leaves that as it is")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", asked)
        assert main(arguments) == code
    assert signal.getsignal(number) == before
    assert newest(out)["step"] == 8
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1] == (
        f"poa: step 8: stopped by {number.name}, checkpoint saved; resume with: poa pretrain --resume '{out}'"
    )
    hint = "poa: stopping after this step, with a checkpoint; Ctrl-C again leaves at once"
    assert (hint in lines) == (number == signal.SIGINT)
    assert main(arguments) == 0
    assert_same_run(out, uninterrupted)


def test_signals_that_are_ignored_stay_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(said=False) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


LEFT_AT_ONCE = """
import sys, threading, time
from poa.__main__ import main
from poa.train import Trainer

def stuck(self, *rest, **options):
    print("stuck", flush=True)
    threading.Lock().acquire(), lock.acquire()

lock = threading.Lock()
lock.acquire()
Trainer.step = stuck
main(["pretrain", "--out", *sys.argv[1:]])
"""


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """Also from a step that never ends. Two in quick succession are one: launchers pass the first on."""
    command = [sys.executable, "-c", LEFT_AT_ONCE, str(tmp_path / "run"), *OVERRIDES]
    run = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    assert run.stdout is not None
    while "stuck" not in run.stdout.readline():
        assert run.poll() is None
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert run.poll() is None
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    errors = run.communicate(timeout=10)[1]
    assert run.returncode == 130 and errors.endswith("poa: left at once, without saving\n"), errors


def test_other_images_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run"
    pretrain(tiny_config("method.optim.epochs=1.5"), out)
    config = RunFolder(out).config()
    pretrain(override(config, ["data.holdout=0.5"]), out, resume=True)
    assert "step 3: expected 1,347 images as before, got 89" in caplog.text


def test_images_of_other_names_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "images", 24)
    config = tiny_config("method.optim.epochs=1.5", f"data.source={tmp_path}/images")
    pretrain(config, tmp_path / "run")
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "ant")
    pretrain(config, tmp_path / "run", resume=True)
    assert "step 3: names or labels of the images are others than before" in caplog.text


def test_a_run_is_extended_by_planning_its_schedules_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    out, longer = tmp_path / "run", ["method.optim.epochs=4", "method.optim.base_lr=0.002"]
    pretrain(tiny_config(), out)
    before = rows(out)
    assert main(["pretrain", "--resume", str(out), *longer]) == 2
    refused = "method.optim.epochs: expected 3.0 as the run was planned, got 4.0; --replan recomputes"
    assert refused in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(out), "--replan", *longer]) == 0
    assert "step 6: schedules recomputed: method.optim.epochs 3.0 -> 4.0, method.optim." in caplog.text
    assert "base_lr 0.003 -> 0.002; 6 -> 8 steps, learning rate 0.000448 -> 0.000508" in caplog.text
    assert [row["step"] for row in rows(out)] == list(range(1, 9)) and rows(out)[:6] == before
    optim = RunFolder(out).config().method.optim
    assert (optim.epochs, optim.base_lr) == (4.0, 0.002)
    planned = Schedules.build(optim, 2, 8)
    assert [row["lr"] for row in rows(out)[6:]] == [planned.lr[6], planned.lr[7]]
    assert main(["pretrain", "--resume", str(out)]) == 0  # as it is now
    assert main(["pretrain", "--resume", str(out), "--replan", "method.optim.epochs=2"]) == 2
    assert "expected at least the 8 steps done, got 4" in capsys.readouterr().err
    assert RunFolder(out).config().method.optim.epochs == 4.0


@pytest.mark.parametrize("option", ["method.optim.beta1=0.5", "method.optim.layer_decay=0.5"])
def test_what_cannot_be_planned_again(option: str, tmp_path: Path, capsys: Any) -> None:
    pretrain(tiny_config(), tmp_path / "run")
    assert main(["pretrain", "--resume", str(tmp_path / "run"), "--replan", option]) == 2
    assert (
        "expected a checkpoint of this configuration, got another: method.optim." in capsys.readouterr().err
    )


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain(tiny_config(), first)
    start = ["pretrain", "--init", str(first), "--out", str(second), "method.optim.base_lr=0.001"]
    assert main(start) == 0
    config = RunFolder(second).config()
    assert config.method.init.weights == str(first)
    changed = {"optim": config.method.optim, "init": config.method.init}
    assert config.method == replace(tiny_config().method, **changed)
    state = TrainingState.start(config, torch.device("cpu"))
    for branch in ("student", "teacher"):
        saved = newest(first)[branch]
        weights = getattr(state, branch).state_dict()
        assert weights.keys() == saved.keys() and all(torch.equal(weights[k], saved[k]) for k in saved)
    assert [row["step"] for row in rows(second)] == [1, 2, 3, 4, 5, 6]
    wider = ["--preset", "quickstart", *OVERRIDES, "method.backbone.max_width=48"]
    for check in ([], ["--check"]):
        assert main(["pretrain", "--init", str(first), "--out", str(second / "x"), *wider, *check]) == 2
        error = capsys.readouterr().err
        assert "method.init.weights: " in error and "expected shape (1, 1, 48), got (1, 1, 32)" in error
        assert not (second / "x").exists()
    shutil.rmtree(first)
    assert main(["pretrain", "--resume", str(second)]) == 0


def test_a_signal_to_all_processes_of_a_run(tmp_path: Path) -> None:
    """Decoding processes outlive it, so that the training process can save."""
    out = tmp_path / "run"
    options = [*OVERRIDES, "method.optim.epochs=2000", "performance.workers=2", "run.save_every=100000"]
    command = [sys.executable, "-m", "poa", "pretrain", "--out", str(out), *options]
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while len(RunFolder(out).rows()) < 3:
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == 130, errors
    assert newest(out)["step"] == rows(out)[-1]["step"] >= 3


def test_a_run_outside_of_the_main_thread(tmp_path: Path) -> None:
    """Signals cannot be caught there; everything else works."""
    thread = threading.Thread(target=pretrain, args=(tiny_config(), tmp_path / "run"))
    thread.start()
    thread.join()
    assert newest(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize("moment", ["damage", "load"])
def test_a_checkpoint_that_is_deleted_while_it_is_read(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a run that trains on; the newer one is taken."""
    pretrain(tiny_config("run.save_every=2"), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    read, newest_path = getattr(Checkpoint if moment == "damage" else RunFolder, moment), []

    def overtaken(self: Any, *inputs: Any, **options: Any) -> Any:
        path = folder.checkpoints()[-1].path
        if not newest_path:
            newest_path.append(path.rename(path.with_name(f"00000007-{path.name[9:]}")))
        return read(self, *inputs, **options)

    monkeypatch.setattr(Checkpoint if moment == "damage" else RunFolder, moment, overtaken)
    assert folder.network()[1].path == newest_path[0]
    with pytest.raises(InputError, match="expected a checkpoint of step 6, got checkpoints of steps: 4, 7"):
        folder.network(step=6)


def test_a_checkpoint_that_cannot_be_read_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(tiny_config(), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    path, opened = folder.checkpoints()[-1].path, open_regular

    def broken(asked: Path) -> Any:
        if asked == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(asked)

    monkeypatch.setattr("poa.checkpoint.open_regular", broken)
    assert folder.network()[1].step == 3
    assert f"{path} cannot be read: Input/output error; using the checkpoint of step 3" in caplog.text


FOREIGN: dict[str, Any] = {
    "step": "x",
    "plan": {"micro_batches": "x"},
    "skipped": [None],
    "watch": {"one-hot targets": {"nobody": 1}},
    "student": {"backbone.cls_token": "text"},
    "teacher": [],
    "optimizer": {"state": 1},
    "centers": [[torch.zeros(1)], []],
    "scaler": [],
    "config": {"method": {"batch_size": "x"}},
}


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("how", ["other", "missing"])
def test_a_checkpoint_of_another_structure(key: str, how: str, tmp_path: Path, capsys: Any) -> None:
    """With a right checksum; one line, and the folder stays as it is."""
    pretrain(tiny_config("run.save_every=6"), tmp_path / "run")
    (whole,) = RunFolder(tmp_path / "run").checkpoints()
    content = torch.load(whole.path) | {key: FOREIGN[key]}
    if how == "missing":
        del content[key]
    torch.save(content, whole.path)
    digest = hashlib.sha256(whole.path.read_bytes()).hexdigest()[:16]
    foreign = whole.path.rename(whole.path.with_name(f"00000006-{digest}.pt"))
    assert main(["pretrain", "--resume", str(tmp_path / "run")]) == 2
    assert "expected " in (line := capsys.readouterr().err) and line.count("\n") == 1, line
    assert [c.path for c in RunFolder(tmp_path / "run").checkpoints()] == [foreign]
