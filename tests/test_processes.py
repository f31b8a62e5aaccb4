"""Several processes: equal to one with as many micro-batches, and what happens when one is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import processes
from helpers.record_step import MICRO_BATCHES, VARIANTS
from helpers.run_folders import assert_same, newest, rows
from helpers.tiny import OVERRIDES, tiny_config
from poa.checkpoint import RunFolder
from poa.data.loader import SampleStream
from poa.distributed import init_distributed
from poa.errors import InputError
from poa.plan import Plan

PRETRAIN = ("-m", "poa", "pretrain", *OVERRIDES)


def recorded(folder: Path, size: int) -> dict[str, Any]:
    """What `size` processes found, micro-batches in order; gradients and centers of all are the same."""
    parts = [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]
    for variant in VARIANTS:
        for other in parts[1:]:
            assert_same(other[variant]["centers"], parts[0][variant]["centers"])
            assert_same(other[variant]["gradients"], parts[0][variant]["gradients"])
        for key in ("subnets", "masked", "targets"):
            parts[0][variant][key] = sum((part[variant][key] for part in parts), [])
    return parts[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    processes.run(1, str(processes.HELPERS / "record_step.py"), str(folder))
    return recorded(folder, 1)


@pytest.mark.parametrize("size", [3, 4])
def test_processes_equal_one_with_all_micro_batches(size: int, alone: dict[str, Any], tmp_path: Path) -> None:
    """Losses, gradients, targets and centers, for every policy.

    Three processes have 1, 1 and 2 micro-batches. Their weights are no powers of two, which brings some
    rounding; KoLeo's gradient enlarges it, as the class tokens are still very near to each other.
    """
    processes.run(size, str(processes.HELPERS / "record_step.py"), str(tmp_path))
    many = recorded(tmp_path, size)
    assert len(set(alone["per-rank"]["masked"])) > 1
    assert len(set(alone["per-rank"]["subnets"])) > 1
    for variant in ["without KoLeo"] if size == 3 else VARIANTS:
        ours, theirs = many[variant], alone[variant]
        assert ours["subnets"] == theirs["subnets"] and ours["masked"] == theirs["masked"]
        assert len(ours["targets"]) == MICRO_BATCHES
        # Each process rounds its gradients to 8 bits, and so does the sum.
        rounding = 1e-2 if variant == "bf16 reduction" else 1e-5
        for name, value in theirs["values"].items():
            tolerance = rounding if name.startswith("grad_norm") else 1e-5
            assert ours["values"][name] == pytest.approx(value, rel=tolerance, abs=1e-7), (variant, name)
        for a, b in zip(sum(ours["targets"], []), sum(theirs["targets"], []), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours["centers"], theirs["centers"], rtol=1e-5, atol=1e-7)
        for name, gradient in theirs["gradients"].items():
            largest = float(gradient.abs().max())
            allowed = {"rtol": rounding, "atol": rounding * largest}
            torch.testing.assert_close(ours["gradients"][name], gradient, **allowed, msg=f"{variant} {name}")


def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path: Path) -> None:
    """Two processes, then one: the same steps, as far as AdamW, which divides small gradients by themselves,
    does not enlarge what another order of sums changes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    processes.run(2, *PRETRAIN, "--out", str(whole))
    processes.run(2, str(processes.HELPERS / "stop_after.py"), str(parts), "3")
    (done,) = processes.run(1, "-m", "poa", "pretrain", "--resume", str(parts))
    assert (
        "step 3: resuming with 2 micro-batches per step on 1 rank instead of 2 on 2: the same steps"
        in done[2]
    )
    logged, expected = rows(parts), rows(whole)
    for mine, theirs in zip(logged, expected, strict=True):
        assert mine.pop("subnets") == theirs.pop("subnets")
        assert mine.pop("balance") == 1 or mine["step"] <= 3  # there is nobody to wait for
        theirs.pop("balance")
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5)
    with pytest.raises(InputError, match="expected one for each of 3 ranks, got 2"):
        raise_from(processes.finish(processes.start(3, "-m", "poa", "pretrain", "--resume", str(parts))))


def raise_from(done: list[tuple[int, str, str]]) -> None:
    """All processes ended with the same line of wrong input."""
    assert {code for code, _, _ in done} == {2}
    raise InputError(done[0][2].strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        ("1", "1", "RANK: expected one below WORLD_SIZE 1 in the environment, got 1"),
        ("0", "0", "RANK: expected one below WORLD_SIZE 0"),
        ("-1", "2", "RANK: expected a whole number in the environment, got '-1'"),
    ],
)
def test_launchers_that_make_no_sense(
    rank: str, size: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=message), init_distributed("cpu"):
        pass


def test_more_micro_batches_repeat_no_image() -> None:
    plan = {"chunks": 1, "epoch_steps": 2, "images": 500, "start": 0}  # as in older checkpoints
    content = {"step": 3, "plan": plan, "config": {"method": {"chunks": None}}}
    again, more = (Plan.resumed(tiny_config(*c), content, 500) for c in ([], ["method.micro_batches=3"]))
    assert again == Plan(1, 2, 500)
    before = [i for batch in SampleStream(500, 8, [0], 1, range(3), 0) for i in batch]
    after = [i for batch in SampleStream(500, 8, range(3), 3, range(3, 8), 0, more.start) for i in batch]
    whole = [i for batch in SampleStream(500, 8, [0], 1, range(18), 0) for i in batch]
    assert before + after == whole
    assert more.epoch_steps == 2
    (line,) = more.differences(Plan(1, 2, 500), (1, 1))
    assert line.endswith("instead of 1 on 1: the data order continues, no image is repeated")


THREADS_AFTER_A_RUN = """
import sys
from pathlib import Path
from helpers.tiny import ONE_STEP, tiny_config
from poa.train import pretrain
pretrain(tiny_config(*ONE_STEP), Path(sys.argv[1]))
names = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the threads in /proc")
def test_no_thread_of_the_process_group_outlives_a_run(tmp_path: Path) -> None:
    """One that is alive when the interpreter ends aborts the process, seldom."""
    processes.run(2, "-c", THREADS_AFTER_A_RUN, str(tmp_path / "run"))


def test_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [*PRETRAIN, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


REDUCED_MEANWHILE = """
import sys
from pathlib import Path
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from helpers.tiny import tiny_config
from poa import train
from poa.backbones import ElasticViT
events, embed = [], ElasticViT.embed

class Small(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, *arguments, **options):
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1
        super().__init__(*arguments, bucket_cap_mb=0.001, **options)
        self.register_comm_hook(None, noted)

def noted(state, bucket):
    events.append("reduced")
    return allreduce_hook(state, bucket)

def noting(self, *inputs):
    x, groups = embed(self, *inputs)
    if x.requires_grad:
        x.register_hook(lambda dx: events.append("backward is over"))
    return x, groups

ElasticViT.embed, train.DistributedDataParallel = noting, Small
train.pretrain(tiny_config("performance.backward=apart"), Path(sys.argv[1]))
*_, intact, elastic = (place for place, event in enumerate(events) if event == "backward is over")
assert elastic - intact > 10, events[intact:]
"""


def test_gradients_are_reduced_during_the_last_backward(tmp_path: Path) -> None:
    processes.run(2, "-c", REDUCED_MEANWHILE, str(tmp_path / "run"))


LOST_NUMBERS = """
import sys
from pathlib import Path
import torch
from helpers.tiny import tiny_config
from poa import step
from poa.__main__ import main
whole, steps = step.tribranch_loss, iter(range(100))
rank, first, last = map(int, sys.argv[2:5])

def spoiled(*inputs):
    total, terms = whole(*inputs)
    if step.torch.distributed.get_rank() == rank and first <= next(steps) < last:
        return total * torch.nan, terms | {"intact.dino.1": total.detach() * torch.nan}
    return total, terms

step.tribranch_loss = spoiled
sys.exit(main(["pretrain", "--out", sys.argv[1], *sys.argv[5:]]))
"""


def test_numbers_lost_on_one_rank_skip_the_step_on_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes.run(2, "-c", LOST_NUMBERS, str(out), "1", "1", "3", *OVERRIDES)
    assert [row["skipped"] for row in rows(out)] == [0, 1, 1, 0, 0, 0]
    assert rows(out)[-1]["skipped_steps"] == 2
    assert all(p.isfinite().all() for p in newest(out)["teacher"].values())


def test_numbers_lost_for_good_on_one_rank_are_reported(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [str(out), "1", "1", "99", *OVERRIDES, "run.skip_limit=3"]
    done = processes.finish(processes.start(2, "-c", LOST_NUMBERS, *arguments))
    for code, _, errors in done:
        assert code == 1
        assert re.search(
            "step 4: the last 3 steps were skipped.* since step 2; .*: rank 1: loss, intact.dino.1. Weights",
            errors,
        ), errors
        assert "Traceback" not in errors
    assert newest(out)["step"] == 3


LOST_RANK = """
import os, signal, sys, time
from poa.__main__ import main
from poa.train import Trainer
step = Trainer.step

def lost(self, number, *rest, **options):
    if number == 4 and self.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "killed" else time.sleep(1000)
    return step(self, number, *rest, **options)

Trainer.step = lost
sys.exit(main(["pretrain", "--out", sys.argv[1], *sys.argv[3:]]))
"""


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_rank_ends_the_others_with_a_message(how: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = processes.start(2, "-c", LOST_RANK, str(out), how, *OVERRIDES, "run.timeout=8")
    started = time.monotonic()
    errors = both[0].communicate(timeout=120)[1]
    assert time.monotonic() - started < 60
    both[1].kill()
    both[1].communicate()
    assert both[0].returncode == 1, errors
    assert "poa: error: rank 0 of 2: lost contact with rank 1\n" in errors
    assert "Traceback" not in errors
    assert newest(out)["step"] == 3
    if how == "killed":
        processes.run(2, "-m", "poa", "pretrain", "--resume", str(out))
        processes.run(2, *PRETRAIN, "--out", str(tmp_path / "whole"))
        assert rows(out) == rows(tmp_path / "whole")


FAILED_RANK = """
import sys, time
from torch import distributed as dist
from poa.__main__ import main
from poa.train import Trainer
step, check = Trainer.step, dist.PrefixStore.check

def late(store, names):
    if names[0].startswith("failed"):  # a slow reader, whom the one that failed must wait for
        time.sleep(0.5)
    return check(store, names)

def failing(self, number, *rest, **options):
    if number == 2:
        dist.PrefixStore.check = late
        if self.world.rank == int(sys.argv[2]):
            raise KeyError("a connection of its own")
    return step(self, number, *rest, **options)

Trainer.step = failing
sys.exit(main(["pretrain", "--out", sys.argv[1], *sys.argv[3:]]))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_failed_is_named_with_its_reason(rank: int, tmp_path: Path) -> None:
    """It shows its own trace; the others one line."""
    both = processes.finish(
        processes.start(2, "-c", FAILED_RANK, str(tmp_path / "run"), str(rank), *OVERRIDES)
    )
    assert [code for code, _, _ in both] == [1, 1]
    failed, other = both[rank][2], both[1 - rank][2]
    assert "Traceback" in failed and "KeyError: 'a connection of its own'" in failed
    reason = f"rank {rank} failed (KeyError: 'a connection of its own')"
    assert f"poa: error: rank {1 - rank} of 2: {reason}\n" in other, other
    assert "Traceback" not in other


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    both = processes.start(2, *PRETRAIN, "--out", str(tmp_path / "run"), "run.timeout=3")
    both[1].kill()
    started = time.monotonic()
    code, _, errors = processes.finish(both)[0]
    assert code == 1 and time.monotonic() - started < 40
    assert "rank 0 of 2: expected all ranks within 3 s (run.timeout), got: " in errors, errors
    assert "Traceback" not in errors


def test_ranks_with_other_options_are_refused(tmp_path: Path) -> None:
    """But for where data lie and how many processes decode them."""
    program = "import sys; from poa.__main__ import main; import os; r = os.environ['RANK']\n"
    program += "sys.exit(main([a.replace('RANK', r) for a in sys.argv[1:]]))"
    arguments = ["pretrain", *OVERRIDES, "performance.workers=RANK", "--out", str(tmp_path / "run")]
    processes.run(2, "-c", program, *arguments)
    arguments = ["pretrain", *OVERRIDES, "method.seed=RANK", "--out", str(tmp_path / "other")]
    for rank, (code, _, errors) in enumerate(processes.finish(processes.start(2, "-c", program, *arguments))):
        seeds = f"got method.seed {rank} on rank {rank}, {1 - rank} on rank {1 - rank}"
        assert code == 2 and f"options: expected the same on all ranks, {seeds}" in errors, errors
    assert not (tmp_path / "other").exists()


MAIN_ALONE = """
import sys, time
from poa.__main__ import main
from poa.checkpoint import RunFolder
save = RunFolder.save

def slow(self, *inputs):
    time.sleep(9)
    save(self, *inputs)
    if sys.argv[2] == "fails":
        raise OSError("of the disk")

RunFolder.save = slow
sys.exit(main(["pretrain", "--out", sys.argv[1], *sys.argv[3:]]))
"""


def test_what_the_main_rank_does_alone_may_outlast_the_timeout(tmp_path: Path) -> None:
    """A checkpoint on a slow disk."""
    out = tmp_path / "run"
    options = [*OVERRIDES, "run.timeout=7", "run.save_every=6"]
    processes.run(2, "-c", MAIN_ALONE, str(out), "works", *options)
    assert newest(out)["step"] == 6


def test_the_main_rank_that_fails_alone_is_named(tmp_path: Path) -> None:
    options = [*OVERRIDES, "run.timeout=20", "run.save_every=6"]
    both = processes.finish(processes.start(2, "-c", MAIN_ALONE, str(tmp_path / "run"), "fails", *options))
    assert [code for code, _, _ in both] == [2, 1]
    assert both[0][2].endswith("poa: error: of the disk\n") and "Traceback" not in both[0][2], both[0][2]
    assert "poa: error: rank 1 of 2: rank 0 failed (OSError: of the disk)\n" in both[1][2], both[1][2]


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = processes.start(
        2, *PRETRAIN, "--out", str(out), "method.optim.epochs=2000", "run.save_every=100000"
    )
    while len(RunFolder(out).rows()) < 3:
        assert both[0].returncode is None
        time.sleep(0.05)
    os.kill(both[1].pid, signal.SIGUSR1)
    done = processes.finish(both)
    assert [code for code, _, _ in done] == [75, 75], done
    step = newest(out)["step"]
    assert f"poa: step {step}: stopped by SIGUSR1, checkpoint saved; resume with" in done[1][2]
    assert f"poa: step {step}: stopped by a signal to another rank, checkpoint saved" in done[0][2]
    assert rows(out)[-1]["step"] == step
