"""Runs the Triton lanes as processes of their own, all at once.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/interpreted` and
`ELASTIC_KERNELS_LANE=compiled pytest tests/kernels/compiled`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
LANES = {
    "interpreted": ("tests/kernels/interpreted", INTERPRETED),
    "golden-vit": ("tests/test_golden_vit.py", INTERPRETED | {"ELASTIC_KERNELS_BACKEND": "triton"}),
    "golden-method": ("tests/test_golden_method.py", INTERPRETED | {"ELASTIC_KERNELS_BACKEND": "triton"}),
    "golden-pyramids": (
        "tests/test_golden_pyramids.py::test_golden_forward",
        INTERPRETED | {"ELASTIC_KERNELS_BACKEND": "triton"},
    ),
    "fast-path": ("tests/test_fast_path.py", INTERPRETED),
    "compiled": ("tests/kernels/compiled", {"ELASTIC_KERNELS_LANE": "compiled"}),
}


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, subprocess.Popen[str]]]:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lanes = {
        name: subprocess.Popen([*command, path], env=os.environ | variables, **options)
        for name, (path, variables) in LANES.items()
    }
    yield lanes
    for process in lanes.values():
        process.kill()


@pytest.mark.parametrize("lane", LANES)
def test_lane(lane: str, running: dict[str, subprocess.Popen[str]]) -> None:
    printed, _ = running[lane].communicate(timeout=1800)
    print(printed[-6000:])
    assert running[lane].returncode == 0, f"lane {lane}: see its output above"
