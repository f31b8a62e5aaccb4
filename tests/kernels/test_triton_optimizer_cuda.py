"""The one-pass optimiser on a GPU, and that no step waits for the device."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import Setting, assert_accurate, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_steps() -> None:
    assert_accurate("cuda")


def test_repeats_bitwise() -> None:
    first, second = (run(Setting(torch.float32, "cuda"), "triton")[0] for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_nothing_waits_for_the_device() -> None:
    setting = Setting(torch.float32, "cuda")
    optimizer = setting.optimizer()
    for step in range(3):
        setting.give_gradients(step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step makes its tables
        try:
            optimizer.step(max_norm=1.0, momentum=0.9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
