"""The training loop: resuming, precisions, several processes, what it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import OVERRIDES, tiny_config

from poa.checkpoint import RunFolder, read_checkpoint
from poa.config import Config
from poa.data.sources import open_data
from poa.distributed import World
from poa.errors import InputError
from poa.losses import SoftTargets, sinkhorn
from poa.optim import clip_gradients, restore_optimizer
from poa.train import Run, initial_network, pretrain
from poa.tribranch import Targets, tribranch_loss

ROOT = Path(__file__).parent.parent
TIMINGS = ("seconds", "images_per_s", "data_wait")


def _run_of(config: Config, folder: Path, rank: int = 0, size: int = 1) -> Run:
    """A process of a run on the CPU, before its beginning."""
    data = open_data(config.run.data, config.run.holdout, config.method.seed)
    return Run(config, RunFolder(folder), data, World(rank, size, torch.device("cpu")))


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


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


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["method.loss.targets=centering"],
        ["method.precision=fp16"],
        ["performance.workers=2", "method.sampling=balanced"],
    ],
    ids=["sinkhorn", "centering", "fp16", "workers"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(*changes)
    pretrain(config, tmp_path / "whole")
    step = Run.step

    def dies(self: Run, number: int, canvases: Any) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, canvases)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, tmp_path / "parts")
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    pretrain(config, tmp_path / "parts", resume=True)
    whole, parts = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert_same(parts, whole)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", ["performance.recompute=true", "performance.workers=2", "performance.optimizer=torch"]
)
def test_performance_options_do_not_change_results(change: str, tmp_path: Path) -> None:
    for name, changes in (("plain", []), ("changed", [change])):
        pretrain(tiny_config("method.backbone.drop_path=0.3", *changes), tmp_path / name)
    plain, changed = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("plain", "changed"))
    assert_same(changed["teacher"], plain["teacher"])
    assert_same(changed["optimizer"]["state"], plain["optimizer"]["state"])
    assert rows(tmp_path / "changed") == rows(tmp_path / "plain")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_agree_on_the_first_losses(precision: str, tmp_path: Path) -> None:
    for name in ("fp32", precision):
        pretrain(tiny_config(f"method.precision={name}"), tmp_path / name)
    exact, rounded = (rows(tmp_path / name)[0]["loss"] for name in ("fp32", precision))
    assert rounded == pytest.approx(exact, rel=1e-2)
    network = RunFolder(tmp_path / precision).network("student")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_half_precision_prototypes_agree_on_the_losses(targets: str, tmp_path: Path) -> None:
    for name in ("fp32", "fp16"):
        changes = [f"method.loss.operands={name}", f"method.loss.targets={targets}"]
        pretrain(tiny_config(*changes), tmp_path / name)
    exact, rounded = (rows(tmp_path / name)[0]["loss"] for name in ("fp32", "fp16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-3)


def test_metrics_and_evaluation_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny_config("run.evaluate_every=3", "run.knn_images=60"), tmp_path / "run")
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3, 4, 5, 6]
    scores = [row for row in logged if "knn" in row]
    assert [row["step"] for row in scores] == [0, 3, 6]
    assert set(scores[0]["knn"]) == {"k", "teacher 32x2", "teacher 16x1", "student 32x2"}
    first = logged[1]
    assert {"intact.dino.0", "elastic.distill.1", "koleo", "lr", "grad_norm.backbone"} <= first.keys()
    assert all(row["intact.ibot.0"] == 0 for row in logged if row.get("step", 0) in (1, 2) and "loss" in row)
    assert logged[-2]["intact.ibot.0"] > 0
    printed = capsys.readouterr().out
    assert "step 6/6  loss" in printed
    assert "data wait" in printed


def test_prototypes_are_frozen_at_first(tmp_path: Path) -> None:
    pretrain(tiny_config("method.optim.epochs=0.5", "method.optim.warmup_epochs=0"), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    student, teacher = folder.network("student"), folder.network("teacher")
    start = dict(initial_network(folder.config()).named_parameters())
    for name, parameter in student.named_parameters():
        unchanged = ".prototypes." in name or name == "backbone.mask_token"  # no masks yet
        assert torch.equal(parameter, start[name]) == unchanged, name
    assert not torch.equal(teacher.backbone.cls_token, student.backbone.cls_token)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Run.step
    bad = {"loss": torch.tensor(float("nan")), "skipped": torch.tensor(1.0)}
    monkeypatch.setattr(Run, "step", lambda self, n, c: step(self, n, c) if n < 4 else bad)
    with pytest.raises(FloatingPointError, match="step 5: the loss is nan"):
        pretrain(tiny_config(), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_gradients_that_are_no_numbers_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is skipped; a finite loss alone does not let the run go on."""
    step = Run.step

    def poisoned(self: Run, number: int, canvases: Any) -> Any:
        if number == 4:
            parameter = next(self.state.student.parameters())
            handle = parameter.register_hook(lambda grad: grad * torch.nan)
            before = parameter.detach().clone()
        values = step(self, number, canvases)
        if number == 4:
            handle.remove()
            assert values["loss"].isfinite() and torch.equal(parameter, before)
        return values

    monkeypatch.setattr(Run, "step", poisoned)
    with pytest.raises(FloatingPointError, match="step 5: the gradients were no numbers in 100%"):
        pretrain(tiny_config(), tmp_path / "run")


@pytest.mark.parametrize("kinds", [("torch", "fused"), ("fused", "torch")])
def test_a_run_goes_on_with_another_optimizer(kinds: tuple[str, str], tmp_path: Path) -> None:
    config = tiny_config()
    pretrain(config, tmp_path / "whole")
    start, rest = (tiny_config(f"performance.optimizer={kind}") for kind in kinds)
    run = _run_of(start, tmp_path / "parts")
    run.begin(resume=False)
    for step, canvases in zip(range(3), run.batches(range(3)), strict=True):
        run.step(step, canvases)
    run.save(3)
    pretrain(rest, tmp_path / "parts", resume=True)
    whole, parts = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert_same(parts["student"], whole["student"])


def test_apex_where_it_is_not(tmp_path: Path) -> None:
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("about an environment without apex")
    with pytest.raises(InputError, match="expected NVIDIA's apex for 'apex', but it does not import"):
        pretrain(tiny_config("performance.optimizer=apex"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_state_of_apexs_optimizer_is_refused(tmp_path: Path) -> None:
    optimizer = _run_of(tiny_config(), tmp_path).state.optimizer
    state = optimizer.state_dict()
    state["param_groups"] = [group | {"bias_correction": True} for group in state["param_groups"]]
    with pytest.raises(InputError, match="checkpoint.pt: expected the state of PyTorch's or the fused"):
        restore_optimizer(optimizer, state, "checkpoint.pt")


def test_fewer_images_than_a_batch(tmp_path: Path) -> None:
    few = ["run.holdout=0.997", "method.optim.epoch_steps=none", "method.batch_size=16"]
    pretrain(tiny_config(*few), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


THREADS_AFTER_A_RUN = """
import sys
from pathlib import Path
from tiny import tiny_config
from poa.train import pretrain
pretrain(tiny_config("method.optim.epochs=0.5", "method.optim.warmup_epochs=0"), Path(sys.argv[1]))
names = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the threads in /proc")
def test_no_thread_of_the_process_group_outlives_a_run(tmp_path: Path) -> None:
    """One that is alive when the interpreter ends aborts the process, seldom."""
    (tmp_path / "script.py").write_text(THREADS_AFTER_A_RUN)
    done = _torchrun(2, str(tmp_path / "script.py"), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr


def _torchrun(processes: int, *program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in ("", "kernels", "tests")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("sampling", ["per-rank", "balanced"])
def test_two_processes(sampling: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = [*OVERRIDES, f"method.sampling={sampling}"]
    done = _torchrun(2, "-m", "poa", "pretrain", "--out", str(out), *changes)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match="expected 2 processes as before, got 1"):
        pretrain(RunFolder(out).config(), out, resume=True)


def _targets_of_the_union(logits: list[Any], temperature: float) -> list[Targets]:
    """Sinkhorn over the rows of all chunks, split into the chunks' targets."""
    parts = []
    for kind in range(2):  # class tokens, patches
        heads = [torch.cat(chunks) for chunks in zip(*(chunk[kind] for chunk in logits), strict=True)]
        sizes = [len(chunk[kind][0]) for chunk in logits]
        parts.append(
            [
                [SoftTargets(t, target.log_scale, temperature) for t in target.logits.split(sizes)]
                for target in sinkhorn(heads, temperature)
            ]
        )
    return [Targets(*([head[n] for head in kind] for kind in parts)) for n in range(len(logits))]


@pytest.mark.parametrize("sampling", ["per-rank", "shared"])
def test_two_processes_equal_one_with_two_chunks(sampling: str, tmp_path: Path) -> None:
    """Losses and gradient norms of the first step, with masks, against both chunks in one process."""
    one_step = ["method.optim.epochs=0.5", "method.optim.warmup_epochs=0", "method.optim.ibot_start_epoch=0"]
    changes = [*OVERRIDES, *one_step, f"method.sampling={sampling}"]
    done = _torchrun(2, "-m", "poa", "pretrain", "--out", str(tmp_path / "run"), *changes)
    assert done.returncode == 0, done.stderr
    (logged,) = rows(tmp_path / "run")

    config = tiny_config(*one_step, f"method.sampling={sampling}")
    chunks = [_run_of(config, tmp_path, rank, 2) for rank in range(2)]
    student, teacher = chunks[0].state.student, chunks[0].state.teacher
    batches = [run.prepare(0, next(run.batches(range(1)))) for run in chunks]
    assert len(batches[0].masks.indices) != len(batches[1].masks.indices)
    logits = [teacher.teacher_logits(batch, torch.float32) for batch in batches]
    targets = _targets_of_the_union(logits, chunks[0].schedules.teacher_temperature[0])
    losses = []
    for run, batch, target in zip(chunks, batches, targets, strict=True):
        outputs = student(batch, run.student_passes(0, batch))
        losses.append(tribranch_loss(*outputs, target, batch, config.method.loss)[0])
    (sum(losses) / 2).backward()
    norms = clip_gradients(student, 0.0)
    assert logged["loss"] == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-5)
    for name, norm in norms.items():
        assert logged[f"grad_norm.{name}"] == pytest.approx(float(norm), rel=1e-4)
