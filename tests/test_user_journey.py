"""A new user's first hour, in seconds: own pictures, a check, a run, Ctrl-C, the rest, and a model to use."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import poa
from helpers.tiny import OVERRIDES


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos/cat` and `photos/dog`, 16 pictures each."""
    home, draw = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    for label, number in np.ndindex(2, 16):
        path = home / "photos" / ("cat", "dog")[label] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)).save(path)
    return home


def start(home: Path, command: str) -> subprocess.Popen[str]:
    """`poa COMMAND` typed in that folder."""
    words = [sys.executable, "-m", "poa", *command.split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=home, stdout=pipe, stderr=pipe, text=True)


def typed(home: Path, command: str) -> str:
    """What the command prints, which nothing is wrong with."""
    with start(home, command) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err
    return out


def test_from_own_pictures_to_a_model(home: Path) -> None:
    options = " ".join([*OVERRIDES, "method.optim.epochs=20", "run.evaluate_every=40"])
    train = f"pretrain --data photos --out runs/first {options}"

    said = typed(home, f"{train} --check").splitlines()
    assert said[:5] == [
        "device: CPU, 1 thread, fp32 products",
        "data: 24 images of photos to train on in 2 classes (cat, dog), labels from class folders; "
        "8 held out for k-NN",
        "network: 4 subnets from 16x1 to 32x2 of a vit, 6,608 to 32,128 parameters",
        "steps: 40 of 8 images, 20 epochs of 2 steps",
        "phases: learning rate rises until step 2, prototypes train from step 1, "
        "masked patches (iBOT) from step 2",
    ]
    assert not (home / "runs").exists()

    with start(home, train) as process:
        assert process.stdout
        seen = [next(process.stdout).strip()]
        while not seen[-1].startswith("step 3/40"):
            seen.append(next(process.stdout).strip())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert seen[: len(said)] == said
    assert re.fullmatch(r"step 0: 20-NN accuracy: (teacher|student) 32x2 .*%", seen[len(said)])
    assert re.fullmatch(
        r"step 3/40  loss \d+\.\d+  speed \S+ img/s  data wait \d+%  ETA 0:0\d:\d\d", seen[-1]
    )
    hint, last = err.split("\n")[1:3]
    assert hint == "poa: stopping after this step, with a checkpoint; Ctrl-C again leaves at once"
    stopped = re.fullmatch(
        r"poa: step (\d+): stopped by SIGINT, checkpoint saved; resume with: poa (.+)", last
    )
    assert stopped and stopped[2] == "pretrain --resume runs/first"

    resumed = typed(home, stopped[2]).splitlines()
    assert f"resume: {stopped[1]} of 40 steps are done" in resumed
    assert resumed[-4].startswith("done in 0:00:") and resumed[-4].endswith(": runs/first")
    advice = [line.removeprefix("next:").split(maxsplit=1)[1] for line in resumed[-3:]]
    assert advice == ["report runs/first", "evaluate runs/first", "extract runs/first --subnets all"]

    assert typed(home, advice[0]) == "runs/first/report.html\n"
    table = typed(home, advice[1]).splitlines()
    assert table[0] == f"{home}/runs/first: teacher of step 40"
    assert [line.split()[0] for line in table[4:-1]] == ["16x1", "16x2", "32x1", "32x2"]
    assert table[-1] == "runs/first/evaluation.json"
    assert len(json.loads((home / table[-1]).read_text())["subnets"]) == 4

    models = typed(home, advice[2]).split()
    assert models == [f"runs/first/models/vit-{name}" for name in ("16x1", "16x2", "32x1", "32x2")]
    model = poa.load(home / models[0])
    with torch.no_grad():
        features = model(home / "photos" / "cat" / "0.jpg")
    assert features.shape == (1, 16) and features.isfinite().all()


def test_a_run_for_a_gpu_says_so_at_once(home: Path) -> None:
    """Within five seconds, of processor time, as machines of tests are busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = typed(home, "pretrain --preset vit-s16 --data photos --out runs/large --check run.device=cpu")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 5
    assert "note: a GPU is expected for bf16 products; for a CPU there are the presets" in said
