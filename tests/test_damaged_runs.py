"""Damaged runs are named by every command, and nothing is written."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from helpers.commands import contents, fails
from poa.checkpoint import RunFolder

Run = Path


def replace_checkpoints(run: Run, content: bytes) -> None:
    """One with a valid name in the place of all."""
    for old in RunFolder(run).checkpoints():
        old.path.unlink()
    (run / "checkpoints" / f"00000006-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def damage_truncate(run: Run) -> None:
    for whole in RunFolder(run).checkpoints():
        content = whole.path.read_bytes()
        whole.path.write_bytes(content[: len(content) // 2])


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damage_pickle(run: Run) -> None:
    replace_checkpoints(run, pickle.dumps({"teacher": Trap(run / "sprung")}))


def damage_torch_pickle(run: Run) -> None:
    replace_checkpoints(run, saved({"teacher": Trap(run / "sprung")}))


def damage_foreign(run: Run) -> None:
    replace_checkpoints(run, saved({"weights": torch.zeros(3)}))


def damage_config(run: Run) -> None:
    config = json.loads((run / "config.json").read_text())
    config["method"]["loss"]["koleo"] = 9.0
    (run / "config.json").write_text(json.dumps(config))


def damage_missing(run: Run) -> None:
    shutil.rmtree(run / "checkpoints")


def damage_no_config(run: Run) -> None:
    (run / "config.json").unlink()


def damage_model(run: Run) -> None:
    (run / "config.json").write_text('{"architecture": "vit", "poa": {}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "is damaged: expected checksum"),
        (damage_pickle, "expected a complete file of weights only, got a damaged or foreign"),
        (
            damage_torch_pickle,
            "weights only, got a damaged or foreign one: UnpicklingError: Weights only load",
        ),
        (damage_foreign, "expected a checkpoint of format poa-checkpoint-2 or poa-classifier-1, got None"),
        (damage_config, "got another: method.loss.koleo: 9.0 against 0.1 in the checkpoint"),
        (damage_missing, "got checkpoints of steps: none; if the run has ended, start it again with --out"),
        (damage_no_config, "expected a run folder"),
        (damage_model, "an extracted model"),
    ],
)
@pytest.mark.parametrize("command", ["extract", "evaluate", "pretrain"])
def test_damaged_runs(
    command: str, damage, message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    before = contents(run)
    arguments = {
        "extract": [str(run), "--subnets", "16x1"],
        "evaluate": [str(run)],
        "pretrain": ["--resume", str(run)],
    }[command]
    assert message in fails(capsys, command, *arguments)
    assert contents(run) == before
    assert not (run / "sprung").exists()
