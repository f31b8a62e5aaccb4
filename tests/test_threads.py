"""How many CPU threads PyTorch takes: few enough that another busy process does not stop a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.tiny import ONE_STEP, OVERRIDES
from poa.__main__ import main
from poa.device import use_threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As PyTorch takes by itself on a machine of three cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "environment", "device", "expected"),
    [
        (None, None, "cpu", 1),
        (None, "", "cpu", 1),
        (None, "3", "cpu", 3),
        (2, None, "cpu", 2),
        (2, "3", "cpu", 2),
        (None, None, "cuda", 3),
        (2, None, "cuda", 2),
    ],
)
def test_threads(
    threads: int | None, environment: str | None, device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    use_threads(threads, torch.device(device))
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("option", "expected"), [([], 1), (["performance.threads=2"], 2)])
def test_commands_take_the_threads_of_the_run(option: list[str], expected: int, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for command in (
        ["pretrain", "--out", run, *OVERRIDES, *ONE_STEP, *option],
        ["evaluate", run, "--subnets", "16x1", "--device", "cpu"],
        ["extract", run, "--subnets", "16x1"],
    ):
        torch.set_num_threads(3)
        assert main(command) == 0
        assert torch.get_num_threads() == expected
