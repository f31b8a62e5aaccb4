"""Runs the Triton lanes, each a process of its own; `tests/conftest.py` has them start first.

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
INTERPRETED = {"TRITON_INTERPRET": "1"}
GOLDEN = INTERPRETED | {"ELASTIC_KERNELS_BACKEND": "triton"}
LANES = {
    "interpreted": ("tests/kernels/interpreted", INTERPRETED),
    # Backwards begin with the forward; a step without iBOT launches what one with it does; of three widths of
    # a Swin the smallest and the largest reach all tiles.
    "golden-vit": ("tests/test_golden_vit.py -k not(forward)", GOLDEN),
    "golden-method": ("tests/test_golden_method.py -k not(noibot)", GOLDEN),
    "golden-pyramids": ("tests/test_golden_pyramids.py -k golden_forward and not(swin-8x)", GOLDEN),
    "fast-path": ("tests/test_fast_path.py", INTERPRETED),
    "compiled": ("tests/kernels/compiled", {"ELASTIC_KERNELS_LANE": "compiled"}),
}


@pytest.mark.parametrize("lane", LANES)
def test_lane(lane: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    path, variables = LANES[lane]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *path.split(" ", 2)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 1800}
    done = subprocess.run(command, env=os.environ | variables, **options)
    print(done.stdout[-6000:], done.stderr[-6000:])
    assert done.returncode == 0, f"lane {lane}: see its output above"
