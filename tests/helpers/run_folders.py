"""Looking at runs: their metrics and checkpoints, and bitwise comparison of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from poa.checkpoint import RunFolder, read_checkpoint
from poa.config import Config
from poa.distributed import World
from poa.train import Trainer

TIMINGS = (
    "seconds",
    "images_per_s",
    "data_wait",
    "rank_seconds",
    "tflop_per_s",
    "mfu",
    "peak_gib",
    "host_ms",
)


def run_of(config: Config, folder: Path, rank: int = 0, size: int = 1) -> Trainer:
    """A process of a run on the CPU, before its beginning."""
    data = config.open()
    return Trainer(config, RunFolder(folder), data, World(rank, size, torch.device("cpu")))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in RunFolder(folder).rows()]


def newest(folder: Path) -> dict[str, Any]:
    """The content of the newest whole checkpoint."""
    return read_checkpoint(RunFolder(folder).newest().path)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise equality of nested checkpoints."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """Bitwise equal newest checkpoints and equal metrics."""
    assert_same(newest(a), newest(b))
    assert rows(a) == rows(b)
