"""Long runs do not grow."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import tiny_config
from poa.checkpoint import RunFolder
from poa.train import Trainer, pretrain

STEPS = 400


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_hundreds_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all subnets, with saves and evaluations: memory, open files and threads stay as they are."""
    measured: list[tuple[float, int, int]] = []
    step = Trainer.step

    def watched(self: Trainer, number: int, *rest: Any, **options: Any) -> Any:
        if number in (STEPS // 4, STEPS - 1):
            gc.collect()
            files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
            measured.append((resident_mib(), files, threads))
        return step(self, number, *rest, **options)

    monkeypatch.setattr(Trainer, "step", watched)
    options = ["method.batch_size=4", "method.crops.local_count=1", f"method.optim.epochs={STEPS / 2}"]
    often = ["run.log_every=10", "run.save_every=100", "run.evaluate_every=200", "run.knn_images=40"]
    pretrain(tiny_config(*options, *often), tmp_path / "run")
    (memory, files, threads), (later, files_later, threads_later) = measured
    assert later - memory < 2, (memory, later)
    assert files_later <= files and threads_later <= threads
    drawn = sum(
        (Counter(row["subnets"]) for row in RunFolder(tmp_path / "run").rows() if "loss" in row), Counter()
    )
    assert drawn.keys() == {"16x1", "16x2", "32x1"} and sum(drawn.values()) == STEPS
