"""One run at a time in a folder; a lock whose process is gone is taken over."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.full_disk import full_at
from helpers.tiny import OVERRIDES, tiny_config
from poa import lock
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.errors import InputError, SaveError
from poa.lock import RunLock
from poa.train import Trainer, pretrain


@contextmanager
def held(folder: Path) -> Iterator[RunLock]:
    ours = RunLock(folder)
    ours.acquire()
    yield ours
    ours.release()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


def left(folder: Path, **changes: Any) -> str:
    """A lock of a process that did not give it back."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    content = {"host": "node7", "pid": gone.pid, "begun": time.time() - 3600, "machine": lock._machine()}
    text = json.dumps(content | {"started": "1"} | changes)
    (folder / "lock").write_text(text)
    return text


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with held(tmp_path):
        before = (tmp_path / "lock").read_text()
        who = f"process {os.getpid()} on {socket.gethostname()}, begun 0:00:0. ago is"
        with pytest.raises(InputError, match=f"that no other run uses, got {tmp_path}: {who}"):
            RunLock(tmp_path).acquire()
        assert (tmp_path / "lock").read_text() == before
    assert not list(tmp_path.iterdir())
    with held(tmp_path):
        pass


SLOW = """
import sys, time
from poa.__main__ import main
from poa.train import Trainer
step = Trainer.step

def slow(self, *rest, **options):
    print("step", flush=True)
    time.sleep(0.7)
    return step(self, *rest, **options)

Trainer.step = slow
sys.exit(main(["pretrain", "--out", *sys.argv[1:]]))
"""


def test_two_runs_and_a_killed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    """Neither another resume nor a new run touches what a run is writing; killed, it goes on by itself."""
    out, often = tmp_path / "run", ["method.optim.epochs=500", "run.save_every=2"]
    first = subprocess.Popen([sys.executable, "-c", SLOW, str(out), *OVERRIDES, *often], stdout=-1, text=True)
    assert first.stdout is not None
    assert "step" in [first.stdout.readline().strip() for _ in range(60)]
    (out / "checkpoints" / "00000099.0123.partial").write_text("being written")
    for command in (["--resume", str(out)], ["--out", str(out), "--auto-resume", *OVERRIDES]):
        assert main(["pretrain", *command]) == 2
        assert f"process {first.pid} on " in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(out), "--check"]) == 0  # which writes nothing
    assert (out / "checkpoints" / "00000099.0123.partial").exists() and first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    shorter = ["--replan", "method.optim.epochs=20"]
    assert main(["pretrain", "--resume", str(out), *shorter]) == 0
    assert f"taken over from process {first.pid} on {socket.gethostname()}, begun 0:" in caplog.text
    assert not list(out.rglob("*.partial")) and not (out / "lock").exists()
    assert [row["step"] for row in RunFolder(out).rows()] == list(range(1, 41))


def reused(folder: Path) -> None:
    left(folder, pid=os.getppid(), started="1")


def damaged(folder: Path) -> None:
    (folder / "lock").write_bytes(b"\xff[")


def not_given_back(folder: Path) -> None:
    """Of this process, which lives; the disk failed as the run ended."""
    left(folder, pid=os.getpid(), started=lock._started(os.getpid()))


GONE = {
    "of a former run of this process": not_given_back,
    "ended": left,
    "its number is another's": reused,
    "no number": lambda folder: left(folder, pid=None),
    "an endless number": lambda folder: left(folder, pid=10**30),
    "another machine": lambda folder: left(folder, machine="x"),
    "empty": lambda folder: (folder / "lock").touch(),
    "damaged": damaged,
    "other JSON": lambda folder: (folder / "lock").write_text("[1]"),
}


@pytest.mark.parametrize("how", GONE)
def test_a_lock_of_nobody_is_taken_over(
    how: str, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    GONE[how](tmp_path)
    with held(tmp_path):
        assert f"{tmp_path / 'lock'}: taken over from process " in caplog.text
        assert ("waiting 0.05 s" in caplog.text) == (how in ("empty", "damaged", "other JSON"))
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_machine_that_shows_a_heartbeat(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path):
        text = (tmp_path / "lock").read_text()
        monkeypatch.setattr(lock, "_machine", lambda: "elsewhere")
        with pytest.raises(InputError, match=f"process {os.getpid()} on"):
            RunLock(tmp_path).acquire()
        assert (tmp_path / "lock").read_text() == text


def test_a_run_that_lost_its_lock_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """As one that slept for hours, while another machine went on with it."""
    step, text = Trainer.step, ""

    def overtaken(self: Trainer, number: int, *rest: Any, **options: Any) -> Any:
        nonlocal text
        if number == 4:
            text = left(self.folder.path)
        return step(self, number, *rest, **options)

    monkeypatch.setattr(Trainer, "step", overtaken)
    with pytest.raises(SaveError, match="lock: expected that of this run, got .* on node7, begun 1:00:"):
        pretrain(tiny_config(), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert [c.step for c in folder.checkpoints()] == [3] and len(folder.rows()) == 4
    time.sleep(0.2)  # beats
    assert (folder.path / "lock").read_text() == text


def test_a_lock_that_was_removed_is_made_again(tmp_path: Path) -> None:
    with held(tmp_path) as ours:
        (tmp_path / "lock").unlink()
        ours.require()
        assert (tmp_path / "lock").exists()


def test_a_full_disk_leaves_no_lock(tmp_path: Path) -> None:
    with full_at(10), pytest.raises(SaveError, match="lock was not written: File too large"):
        RunLock(tmp_path).acquire()
    assert not list(tmp_path.iterdir())
