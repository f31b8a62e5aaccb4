"""Whether a chosen subnet keeps its budget when it is timed again: said by numbers, and by the exit code."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks import selection
from poa.selection.runtimes import CALLS, WARM

SUBNETS, TURNS = 4, 2


@pytest.mark.parametrize(("later", "error", "code"), [(1.05, "5.0%", 0), (1.2, "20.0%", 1)])
def test_latencies_that_change(
    later: float,
    error: str,
    code: int,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A call takes as many milliseconds as there are features; after the first table, `later` times that."""
    calls = count()

    def timed(call: object, _: torch.device) -> tuple[float, int]:
        is_later = next(calls) >= SUBNETS * TURNS * (WARM + CALLS)
        return call().shape[1] * (later if is_later else 1.0), 0  # type: ignore[operator]

    monkeypatch.setattr("poa.selection.runtimes._timed", timed)
    monkeypatch.setattr("poa.selection.runtimes.ROUNDS", (TURNS, TURNS))
    assert selection.main(str(run), 1) == code
    *budgets, worst = capsys.readouterr().out.splitlines()[-5:]
    assert worst == f"largest error {error}, allowed 10%"
    assert [line.partition(" ms: ")[0] for line in budgets] == [
        f"at most {ms}.000" for ms in (16, 24, 32, 32)
    ]
    assert budgets[0].split(": ")[1][:4] in ("16x1", "16x2") and "predicted 16.000 ms" in budgets[0]
