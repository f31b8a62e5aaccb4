"""Start the processes of a run as a launcher would, and wait for them.

They are forks of one process that has imported everything and computed nothing: a fresh interpreter takes
seconds to import PyTorch.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HELPERS = Path(__file__).parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "helpers.processes",
        "helpers.late_imports",
        "helpers.record_step",
        "helpers.fake_parts",
        "benchmarks.gpu",
        "poa.evaluate.linear",
    ]
)


class Program:
    """`python ARGUMENTS` in a process of its own, used like a `subprocess.Popen`."""

    def __init__(self, arguments: tuple[str, ...], variables: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory()
        self._printed = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._printed:
            path.touch()
        self._process = FORKS.Process(target=_execute, args=(arguments, variables, self._printed))
        self._process.start()
        self.kill, self.pid = self._process.kill, self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error, once it has ended; at most `timeout` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        output, errors = (path.read_text() for path in self._printed)
        return output, errors


def _execute(arguments: tuple[str, ...], variables: dict[str, str], printed: list[Path]) -> None:
    multiprocessing.set_start_method(None, force=True)  # the default, as in any other program
    os.environ.update(variables)
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def start(size: int, *arguments: str) -> list[Program]:
    """`python ARGUMENTS` in `size` processes that find each other as under `torchrun`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Program(arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def finish(programs: list[Program], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    try:
        outputs = [program.communicate(timeout) for program in programs]
    finally:
        for program in programs:
            program.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(programs, outputs, strict=True)]


def run(size: int, *arguments: str) -> list[tuple[int, str, str]]:
    """Start and finish, all of them with exit code 0."""
    done = finish(start(size, *arguments))
    assert all(code == 0 for code, _, _ in done), "\n".join(err for _, _, err in done)
    return done
