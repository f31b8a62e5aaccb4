"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # tiny tensors: a second thread only costs, and results repeat bitwise
# Those of every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / path) for path in ("", "kernels", "tests"))

if os.environ.get("TRITON_INTERPRET") == "1":
    from helpers import quick_interpreter

    quick_interpreter.install()

LONGEST = ("test_lanes.py", "test_readme.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Lanes and READMEs take longest, so each process of pytest-xdist begins with its share of them."""
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    lanes = [item for item in items if item.path.name in LONGEST]
    rest = [item for item in items if item.path.name not in LONGEST]
    size, items[:] = -(-len(items) // count), []  # of the part that a process is given first
    for process in range(count):
        own = lanes[process::count]
        items += own + rest[: size - len(own)]
        del rest[: size - len(own)]
    items += rest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `cuda` run where there is a GPU, or what their lane has in its place."""
    marker = item.get_closest_marker("cuda")
    if marker is None or torch.cuda.is_available():
        return
    if os.environ.get("TRITON_INTERPRET") != "1" or not marker.kwargs.get("or_interpreted"):
        pytest.skip("needs CUDA")


@pytest.fixture
def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on digits."""
    from helpers.tiny import OVERRIDES
    from poa.__main__ import main

    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["pretrain", "--out", str(out), *OVERRIDES]) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
