"""`PYTHONPATH=tests python -m helpers.sweep_options [EVERY]`: tiny runs with absurd options, one at a time.

Each option of each kind of backbone takes each value (or each EVERY-th of all these pairs). A run may refuse
the value in one line (exit code 2), end in one line (1), or train to its end (0); nothing else may happen. It
is a program of its own, since runs are forks, which autograd allows only of a process that has not used it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import helpers.late_imports  # noqa: F401  (forks share them)
from helpers.tiny import tiny_config, tiny_pyramid
from poa.__main__ import main
from poa.options import describe

VALUES = ("0", "-1", "1", "2", "0.5", "1e30", "1e-30", "NaN", "-Infinity", "", " ", "many", "none", "true")
VALUES += ("[]", "{}", "[1,", "1,2,3,4,5", "\n", "\0", "\udcff", "../nowhere", "9" * 5000, "[" * 60_000)
SECONDS = 60  # of processor time for six steps; ten times as many for waits, as machines may be busy
KINDS = {"vit": tiny_config(), "swin": tiny_pyramid("swin"), "resnet": tiny_pyramid("resnet")}


def pairs() -> Iterator[tuple[str, str]]:
    """`(kind of backbone, KEY=VALUE)`; what does not depend on the kind once."""
    for kind, config in KINDS.items():
        for key, *_ in describe(config):
            if kind == "vit" or key.startswith("method.backbone."):
                yield from ((kind, f"{key}={value}") for value in VALUES)


def attempt(kind: str, assignment: str, folder: Path) -> tuple[str, str]:
    """What became of a run in a fork of this process, and what it said on standard error."""
    said = folder / "stderr"
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        out, err = (os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) for path in (os.devnull, said))
        os.dup2(out, 1), os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1, errors="backslashreplace")
        config = tiny_config() if kind == "vit" else tiny_pyramid(kind)
        base = [f"{key}={text(value)}" for key, _, value, _ in describe(config)]
        try:
            code: object = main(["pretrain", "--out", str(folder / "run"), *base, assignment])
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code if isinstance(code, int) else 98)
    ended, deadline = (0, 0), time.monotonic() + 10 * SECONDS
    while ended[0] == 0 and time.monotonic() < deadline:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.005)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    code, lines = os.waitstatus_to_exitcode(ended[1]), said.read_text(errors="replace")
    names = {0: "ran", 1: "ended", 2: "refused"}
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return "endless", lines
    one_line = lines.count("\n") == 1 and len(lines) < 1100
    return (names[code] if code == 0 or (code in names and one_line) else f"WRONG, exit code {code}"), lines


def text(value: object) -> str:
    """An option's value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def sweep(every: int) -> Iterator[tuple[str, str, str]]:
    """`(assignment, what became of it, standard error)`."""
    for kind, assignment in list(pairs())[::every]:
        with tempfile.TemporaryDirectory() as folder:
            yield f"{kind}: {assignment}", *attempt(kind, assignment, Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for assignment, result, said in sweep(int(sys.argv[1]) if len(sys.argv) > 1 else 1):
        counts[result] += 1
        if result != "refused":
            print(repr(assignment[:80]), result, said[-300:], flush=True)
    print(dict(counts))
    raise SystemExit(bool(counts.keys() - {"ran", "ended", "refused"}))
