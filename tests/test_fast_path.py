"""Training with the kernels against training without them, from the same seed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from elastic_kernels import backend
from elastic_kernels.dispatch import INTERPRETED
from poa.checkpoint import RunFolder
from poa.config import Config, preset
from poa.options import override
from poa.train import pretrain

CUDA = torch.cuda.is_available()
STEPS = 200


def train(config: Config, out: Path, name: str) -> list[dict]:
    with backend(name):
        pretrain(config, out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1")
@pytest.mark.parametrize("changes", [[], ["performance.recompute=true"]], ids=["saved", "recomputed"])
def test_three_steps(changes: list[str], tmp_path: Path) -> None:
    """Losses, norms and weights; the second step trains the prototypes, the third has masks."""
    sizes = ["method.batch_size=4", "method.crops.local_count=1", "method.optim.epochs=1.5"]
    device = f"run.device={'cuda' if CUDA else 'cpu'}"
    config = tiny_config(*sizes, device, *changes)
    runs = {name: train(config, tmp_path / name, name) for name in ("reference", "triton")}
    plain, fused = ([row for row in rows if "loss" in row] for rows in runs.values())
    assert [row["step"] for row in fused] == [1, 2, 3] and fused[2]["intact.ibot.0"] > 0
    for ours, theirs in zip(fused, plain, strict=True):
        for name in theirs.keys() - {"seconds", "images_per_s", "data_wait"}:
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-4, abs_tol=1e-5), name
    for branch in ("student", "teacher"):
        networks = [RunFolder(tmp_path / name).network(branch) for name in runs]
        for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("seed", range(3))
def test_many_steps_on_digits(seed: int, tmp_path: Path) -> None:
    """The loss stays within 2 % of the plain path's, averaged over 20 steps, and k-NN within 4 points."""
    changes = ["run.device=cuda", f"method.seed={seed}", f"method.optim.epochs={STEPS / 21:.4f}"]
    changes += [f"run.evaluate_every={STEPS}", "run.log_every=20", "method.optim.warmup_epochs=1"]
    config = override(preset("quickstart"), changes)
    runs = [train(config, tmp_path / name, name) for name in ("reference", "triton")]
    plain, fused = ([row["loss"] for row in rows if "loss" in row] for rows in runs)
    assert len(fused) >= STEPS // 20
    assert fused == pytest.approx(plain, rel=0.02)
    last = [[row["knn"] for row in rows if "knn" in row][-1] for rows in runs]
    for name, score in last[0].items():
        assert last[1][name] == pytest.approx(score, abs=0.04 if name != "k" else 0), name
