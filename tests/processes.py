"""Start the processes of a run as a launcher would, and wait for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join(str(ROOT / path) for path in ("", "kernels", "tests"))


def start(size: int, *program: str) -> list[subprocess.Popen[str]]:
    """`python PROGRAM` in `size` processes that find each other as under `torchrun`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *program],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, outputs, strict=True)]


def run(size: int, *program: str) -> list[tuple[int, str, str]]:
    """Start and finish, all of them with exit code 0."""
    done = finish(start(size, *program))
    assert all(code == 0 for code, _, _ in done), "\n".join(err for _, _, err in done)
    return done
