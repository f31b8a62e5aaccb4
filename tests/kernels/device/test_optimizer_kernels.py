"""The one-pass optimiser on a device, and that no step waits for it."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels import FusedAdamW, backend
from elastic_kernels.triton_ops.optimizer import TENSORS
from helpers.kernels.optimizer_cases import Setting, assert_accurate, assert_same_at_odd_addresses, run
from helpers.kernels.sizes import gpu_only

pytestmark = pytest.mark.cuda


def test_steps() -> None:
    assert_accurate("cuda")


def test_addresses_that_allow_no_wide_accesses() -> None:
    assert_same_at_odd_addresses("cuda")


def test_more_tensors_than_a_block() -> None:
    """Every tensor gets the coefficients of its own group."""
    results = []
    for name in ("triton", "reference"):
        params = [torch.full((3,), 1.0, device="cuda", requires_grad=True) for _ in range(TENSORS + 7)]
        for n, p in enumerate(params):
            p.grad = torch.full_like(p, n % 5 - 2.0)
        groups = [{"params": params[n::3], "lr": 0.1 * n} for n in range(3)]
        with backend(name):
            FusedAdamW(groups).step(max_norm=1.0)
        results.append(torch.stack(params).detach())
    torch.testing.assert_close(*results)


@gpu_only
def test_repeats_bitwise() -> None:
    first, second = (run(Setting(torch.float32, "cuda"), "triton")[0] for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@gpu_only
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
