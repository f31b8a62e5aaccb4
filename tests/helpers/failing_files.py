"""`PYTHONPATH=tests python -m helpers.failing_files COUNT [SEED]`: so many file operations that fail.

One call of one kind, on a file of the run or of its data, raises the error of a disk, while a command works.
The command may refuse in one line, or go on; repeated, it must do all of its work without any help.
"""

from __future__ import annotations

import _pyio
import builtins
import errno
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from helpers.damage import example
from helpers.run_folders import assert_same_run
from helpers.tiny import OVERRIDES
from poa.__main__ import main

OPERATIONS = ("open", "read", "write", "fsync", "replace", "rename", "unlink", "scandir", "listdir", "mkdir")
OPERATIONS += ("stat", "statvfs", "utime", "ftruncate", "close")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ESTALE, errno.EDQUOT)
COMMANDS: dict[str, tuple[str, ...]] = {
    "check": ("pretrain", "--data", "DATA/a.tar", "--check", *OVERRIDES),
    "check folder": ("pretrain", "--data", "DATA/images", "--check", *OVERRIDES),
    "train": ("pretrain", "--data", "DATA/a.tar", "--out", "WORK/new", "--auto-resume", *OVERRIDES),
    "resume": ("pretrain", "--resume", "WORK/half"),
    "evaluate": ("evaluate", "WORK/run", "--subnets", "16x1", "--device", "cpu"),
    "extract": ("extract", "WORK/run", "--subnets", "16x1"),
    "report": ("report", "WORK/run"),
}


class Failure:
    """The `at`-th call (from 1; 0: none) of an operation on a path below a folder fails.

    Attributes:
        calls: so far.
        where: the path on which it failed.
    """

    def __init__(self, below: Path, operation: str, at: int, number: int = errno.EIO):
        self.below, self.operation, self.at, self.number = str(below), operation, at, number
        self.calls, self.where = 0, ""

    def fails(self, target: object) -> None:
        """Count a call."""
        if self.operation == "unlink" and os.path.basename(target) == "lock":
            return  # the repetition is of the same process, which holds it then
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)  # type: ignore[call-overload]
        if not os.path.abspath(os.fsdecode(path)).startswith(self.below):
            return
        self.calls += 1
        if self.calls == self.at:
            self.where = os.fsdecode(path)
            raise OSError(self.number, os.strerror(self.number), *[path] * (not isinstance(target, int)))

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """While files are read and written in Python, by functions of `os` that may fail."""
        real: Callable[..., Any] = getattr(os, self.operation)

        def counted(target: Any = ".", *rest: Any, **options: Any) -> Any:
            if self.operation != "close":
                self.fails(target)
                return real(target, *rest, **options)
            try:
                self.fails(target)
            finally:
                real(target)

        opened = builtins.open, io.open, Path.open
        builtins.open = io.open = _pyio.open  # type: ignore[assignment]
        Path.open = lambda path, *rest, **options: _pyio.open(path, *rest, **options)  # type: ignore
        setattr(os, self.operation, counted)
        try:
            yield
        finally:
            setattr(os, self.operation, real)
            builtins.open, io.open, Path.open = opened  # type: ignore[misc, method-assign]


class Example:
    """The run of `damage.example`, and half of it; commands work in a copy, in which calls fail."""

    def __init__(self, folder: Path):
        self.folder, self.work = folder, folder / "work"
        with tarfile.open(folder / "a.tar") as tar:
            tar.extractall(folder / "images" / "cat", filter="data")

    def run(self, name: str, failure: Failure | None = None) -> tuple[int, str, str]:
        """Exit code, standard error and standard output of a command."""
        words = [w.replace("WORK", str(self.work)).replace("DATA", str(self.folder)) for w in COMMANDS[name]]
        printed, said = io.StringIO(), io.StringIO()
        with redirect_stdout(printed), redirect_stderr(said):
            try:
                with failure.arranged() if failure else nullcontext():
                    code = main(words)
            except Exception:
                traceback.print_exc()
                code = 99
        return code, said.getvalue(), printed.getvalue()

    def renew(self) -> None:
        """Forget what commands did."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for run in ("run", "half"):
            shutil.copytree(self.folder / "run", self.work / run)
        for path in self.work.glob("half/checkpoints/00000006-*"):
            path.unlink()

    def calls(self, name: str, operation: str) -> int:
        """How often a command calls an operation on one of our files."""
        self.renew()
        failure = Failure(self.folder, operation, 0)
        code, said, _ = self.run(name, failure)
        assert (code, said) == (0, ""), said
        return failure.calls

    def tried(self, name: str, operation: str, at: int, number: int) -> str:
        """What became of a command; its repetition does all of it."""
        self.renew()
        failure = Failure(self.folder, operation, at, number)
        code, said, printed = self.run(name, failure)
        if not failure.where:
            return "never called"
        loss = "could not be read" in said or "unreadable" in printed
        assert code in (0, 1, 2) and (said.count("\n") == 1 or code == 0), f"{code} {failure.where}: {said}"
        again, said_again, printed_again = self.run(name)
        assert again == 0, f"{failure.where}: {said_again}"
        assert not list(self.work.rglob("*.partial")), failure.where
        run = self.work / {"train": "new", "resume": "half"}.get(name, "run")
        if run.name != "run" and not loss:
            assert_same_run(run, self.folder / "run")
        elif run.name == "run" and code == 0:
            printed = printed.replace("evaluation-2", "evaluation")  # beside one that could not be read
            assert said or printed == printed_again, f"{failure.where}: {printed} {printed_again}"
        return {0: "went on" + ", said" * bool(said), 1: "ended", 2: "refused"}[code]


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    example(place)
    made = Example(place)
    calls = {(c, o): n for c in COMMANDS for o in OPERATIONS if (n := made.calls(c, o))}
    print({f"{c} {o}": n for (c, o), n in calls.items()}, flush=True)
    draw, counts = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0), Counter[str]()
    for _ in range(int(sys.argv[1])):
        command, operation = draw.choice(list(calls))
        at, number = draw.randint(1, calls[command, operation]), draw.choice(ERRORS)
        try:
            result = made.tried(command, operation, at, number)
        except AssertionError as error:
            result = "WRONG"
            print(f"{command}: {operation} {at} {errno.errorcode[number]}: {error}", flush=True)
        counts[f"{command}: {result}"] += 1
    print(json.dumps(counts, indent=1, sort_keys=True))
    shutil.rmtree(place)
    raise SystemExit(any("WRONG" in name for name in counts))
