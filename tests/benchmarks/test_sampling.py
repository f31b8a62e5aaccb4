"""What policies of drawing subnets cost."""

from __future__ import annotations

import pytest

from benchmarks import sampling


def test_waiting_by_flops() -> None:
    costs = {policy: sampling.waiting_by_flops("vit-l16", policy, 4) for policy in sampling.POLICIES}
    assert costs["shared"] == 0
    assert 0 < costs["balanced"] < 0.02 < 0.1 < costs["per-rank"]


@pytest.mark.parametrize("policy", sampling.POLICIES)
def test_one_process_never_waits(policy: str) -> None:
    assert sampling.waiting_by_flops("quickstart", policy, 1) == 0


def test_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "POLICIES", ("shared",))
    (row,) = sampling.run("quickstart", "digits", 2, 3, "cpu")
    assert row["waiting_by_flops"] == 0 and 0 <= row["waiting"] < 0.5
    assert row["device"] == "cpu"
    assert "shared" in capsys.readouterr().out


def test_a_run_that_fails() -> None:
    with pytest.raises(ValueError, match="sampling: a run with per-rank failed: poa: error: data: expected"):
        sampling.run("quickstart", "nowhere", 2, 3, "cpu")
