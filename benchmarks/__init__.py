"""Measurements of the kernels and of the step, with the packages of the checkout that they lie in."""

import sys
from pathlib import Path

KERNELS = str(Path(__file__).resolve().parent.parent / "kernels")
if KERNELS not in sys.path:
    sys.path.insert(1, KERNELS)  # after the root of the checkout
