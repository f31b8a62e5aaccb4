"""Training quality against wall time: what a provider holds is released."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import quality


def test_a_provider_is_closed_when_its_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    run: Any = SimpleNamespace(schedules=SimpleNamespace(total_steps=1))  # without batches
    provider: Any = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(quality, "_start", lambda *_: run)
    with pytest.raises(AttributeError, match="batches"):
        quality._train("ours", lambda _: provider, run, torch.device("cpu"), 1.0)
    assert closed == [True]
