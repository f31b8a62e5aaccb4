"""The kernel cases under pytest-benchmark: `pytest benchmarks`, `pytest benchmarks --benchmark-compare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.cases import CASES, REAL, TINY

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = REAL if DEVICE.type == "cuda" else TINY
PROBLEMS = {
    f"{case.name}-{number}": make
    for case in CASES
    for number, make in enumerate(case.problems(DEVICE, SIZES))
}


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("which", ["ours", "naive"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel(name: str, which: str, mode: str, benchmark: Callable[..., Any]) -> None:
    pytest.importorskip("pytest_benchmark")
    problem: harness.Problem = PROBLEMS[name]()
    if mode not in problem.modes:
        pytest.skip("has no backward")
    provider = problem.providers[which]()
    low, truth = harness.truth_of(problem)
    assert harness.gate(problem, provider, low, truth) is None
    call = harness.call_of(provider, problem, mode)

    def waited() -> None:
        call()()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {mode}"  # type: ignore[attr-defined]
    benchmark(waited)
