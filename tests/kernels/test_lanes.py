"""Runs the Triton lanes as processes of their own.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/interpreted` and
`ELASTIC_KERNELS_LANE=compiled pytest tests/kernels/compiled`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LANES = {
    "interpreted": ("tests/kernels/interpreted", {"TRITON_INTERPRET": "1"}),
    "golden-interpreted": (
        "tests/test_golden_vit.py",
        {"TRITON_INTERPRET": "1", "ELASTIC_KERNELS_BACKEND": "triton"},
    ),
    "compiled": ("tests/kernels/compiled", {"ELASTIC_KERNELS_LANE": "compiled"}),
}


@pytest.mark.parametrize("lane", LANES)
def test_lane(lane: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    path, variables = LANES[lane]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", path]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=900
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, f"lane {lane}: see its output above"
