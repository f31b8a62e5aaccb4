"""The runner on a CPU, with cases that fail: rows are kept, the others run, a second call goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, runner
from benchmarks.cases import CASES
from benchmarks.journal import Journal
from benchmarks.runner import Part, Runner
from helpers import fake_parts
from helpers.fake_parts import FINE, part
from helpers.processes import FORKS


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that has imported PyTorch, which takes seconds; the command has fresh ones."""
    monkeypatch.setattr(runner, "PROCESSES", FORKS)


def run(folder: Path, *parts: Part, **how: bool) -> Journal:
    """A journal after a run, read from its folder."""
    Runner(Journal(folder, **how), 600.0).run(parts)
    return Journal(folder, resume=True)


def ops(journal: Journal) -> list[str]:
    return [row["op"] for row in journal.rows()]


def test_a_case_that_fails_loses_only_itself(tmp_path: Path) -> None:
    bad = {
        "raises": (partial(fake_parts.raises, ValueError("got 4\nmore")), "ValueError: got 4"),
        "out of memory": (
            fake_parts.out_of_memory,
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB.",
        ),
        "dies": (partial(fake_parts.dies, 3), "its process ended with status 3"),
        "is killed": (fake_parts.is_killed, "its process ended with SIGKILL"),
        "hangs": (fake_parts.hangs, "no end within 1 s"),
    }
    fakes = part(*((name, case) for name, (case, _) in bad.items()), FINE, seconds=1.0)
    journal = run(tmp_path, fakes)
    assert ops(journal) == ["before"] * 4 + ["fine"], "rows before a failure are kept"
    assert journal.failures() == [f"fake: {name}: {reason}" for name, (_, reason) in bad.items()]
    assert journal.finished() == {("fake", case.name) for case in fakes.cases}
    first, second, *others = (row["pid"] for row in journal.rows())
    assert first == second, "a process that can go on does"
    assert len({first, *others}) == 4


def test_a_peer_that_takes_its_process_along_loses_only_itself(tmp_path: Path) -> None:
    fates = {
        "dies": "its process ended with status 7",
        "hangs": "no end within 1 s",
        "loses the device": "AcceleratorError: CUDA error: an illegal memory access",
    }
    absent = {"fast": "it is not installed"}
    cases = [(fate, partial(fake_parts.peers, {"naive": fate} | absent)) for fate in fates]
    journal = run(tmp_path, part(*cases, FINE, seconds=1.0))
    assert [row["provider"] for row in journal.rows()] == ["ours"] * 7
    assert ops(journal)[-1] == "fine"
    lost = [f"fake: naive: {reason}" for reason in fates.values()]
    assert sorted(journal.failures()) == sorted([*lost, "fake: fast: it is not installed (3 cases)"])
    assert all(journal.aside(("fake", fate)) == {"naive"} for fate in fates)


def test_the_minutes_end_in_the_middle_and_a_second_call_goes_on(tmp_path: Path) -> None:
    marks = [tmp_path / f"mark{n}" for n in range(3)]
    out = tmp_path / "out"
    slow = [
        (f"slow {n}", partial(fake_parts.takes, 100.0 if n == 1 else 0.0, mark))
        for n, mark in enumerate(marks)
    ]
    fakes, later = part(("bad", fake_parts.out_of_memory), *slow), Part("later", part(FINE).cases)
    limited = Runner(Journal(out), 600.0)

    def end_soon() -> None:
        while not marks[1].exists():
            time.sleep(0.05)
        limited.deadline = time.monotonic() + 1.0

    with ThreadPoolExecutor(1) as pool:
        pool.submit(end_soon)
        limited.run([fakes, later])
    first = Journal(out, resume=True)
    assert ops(first) == ["slow", "slow"], "the row of the case that was stopped is kept"
    left = [case.name for p in (fakes, later) for case in Runner(first, 0.0).left(p)]
    assert left == ["slow 1", "slow 2", "fine"]

    slow[1] = ("slow 1", partial(fake_parts.takes, 0.0, marks[1]))
    fakes = part(("bad", fake_parts.out_of_memory), *slow)
    second = run(out, fakes, later, resume=True)
    assert [mark.read_text().count("ran") for mark in marks] == [1, 2, 1]
    assert ops(second) == ["slow", "slow", "slow", "slow", "fine"]
    assert not Runner(second, 0.0).left(fakes)
    assert second.failures() == first.failures() != []
    again = Journal(out, resume=True, retry=True)
    assert [case.name for case in Runner(again, 0.0).left(fakes)] == ["bad"]


def test_cases_side_by_side(tmp_path: Path) -> None:
    """Each in a process of its own, two at a time."""
    slow = [(f"slow {n}", partial(fake_parts.takes, 0.1, tmp_path / f"mark{n}")) for n in range(2)]
    fakes = part(*slow, ("bad", partial(fake_parts.dies, 3)), processes=2, fresh=True)
    journal = run(tmp_path / "out", fakes)
    assert sorted(ops(journal)) == ["before", "slow", "slow"]
    assert len({row["pid"] for row in journal.rows()}) == 3
    assert len(journal.finished()) == 3


def test_a_part_leaves_time_to_others(tmp_path: Path) -> None:
    slow = [(f"slow {n}", partial(fake_parts.takes, 100.0, tmp_path / f"mark{n}")) for n in range(2)]
    first, second = part(*slow, share=0.01), Part("later", part(FINE).cases)
    journal = run(tmp_path / "out", first, second)
    assert ops(journal)[-1] == "fine"
    assert [case.name for case in Runner(journal, 0.0).left(first)] == ["slow 0", "slow 1"]


def test_a_folder_with_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    Journal(tmp_path).row(fake_parts.row("first"))
    with pytest.raises(ValueError, match="--out: expected a folder without rows.jsonl, or --resume"):
        Journal(tmp_path)


def test_a_line_that_was_being_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.row(fake_parts.row("first"))
    journal.end(("fake", "first"), "", 1.0)
    for name in ("rows.jsonl", "cases.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"op": "torn')
    resumed = Journal(tmp_path, resume=True)
    assert resumed.finished() == journal.finished()
    assert resumed.rows() == journal.rows()
    resumed.row(fake_parts.row("next"))
    assert ops(resumed) == ["first", "next"]


TESTS = """
import os
import pytest
pytestmark = getattr(pytest.mark, "cuda")
def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_dies(): os._exit(3)
def test_after(): pass
def test_skipped(): pytest.skip("needs two GPUs")
"""


def test_a_test_that_takes_its_process_along_loses_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "test_of_kernels.py"
    file.write_text(TESTS)
    plan = gpu.Plan("cpu", 0, None, all_widths=False)
    run_tests = ("file", partial(gpu.run_tests, plan, str(file)))
    journal = run(tmp_path / "out", Part("tests", part(run_tests).cases, fresh=True))
    rows = {row["provider"].partition("::")[2]: row["mode"] for row in journal.rows()}
    assert rows == {
        "test_passes": "passed", "test_fails": "failed", "test_after": "passed", "test_skipped": "skipped"
    }  # fmt: skip
    assert len(journal.rows()) == 5, "those that passed are not run again, the one that failed is"
    failed, died, whole = journal.failures()
    assert "test_fails: AssertionError: one is not two" in failed
    assert "test_dies: its process ended with status 3" in died
    assert whole == "tests: file: 1 failed"
    retried = Journal(tmp_path / "out", resume=True, retry=True)
    assert not retried.finished()
    settled = {name.partition("::")[2] for name in retried.aside(("tests", "file"))}
    assert settled == {"test_passes", "test_after", "test_skipped"}
    assert not Journal(tmp_path / "out", resume=True).failures(), "what is retried is forgotten"


def test_command_in_the_root_and_elsewhere(tmp_path: Path) -> None:
    """Without PYTHONPATH for the checkout, nor an installation of it; `-S` leaves out editable ones."""
    environment = os.environ | {"PYTHONPATH": str(Path(torch.__file__).parent.parent)}
    options = [
        "gpu",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "session"),
        "--parts",
        "environment",
        "optimizer",
    ]

    def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        python = [sys.executable, "-S", *arguments]
        return subprocess.run(python, cwd=folder, env=environment, capture_output=True, text=True)

    first = command(tmp_path, str(gpu.ROOT / "benchmarks"), *options)
    assert first.returncode == 0, first.stderr
    assert "optimizer      1 of 1 cases" in first.stdout
    assert "optimizer: apex: runs on CUDA only" in first.stdout
    journal = Journal(tmp_path / "session", resume=True)
    assert set(ops(journal)) == {"ceilings", "optimizer"}
    again = command(gpu.ROOT, "-m", "benchmarks", *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert Journal(tmp_path / "session", resume=True).rows() == journal.rows()
    mixed = command(gpu.ROOT, "-m", "benchmarks", *options)
    assert mixed.returncode == 1
    assert mixed.stderr.startswith("benchmarks: --out: expected a folder without rows.jsonl, or --resume")


@pytest.mark.parametrize(("memory", "counts"), [(80e9, [64, 32, 50]), (141e9, [64])])
def test_the_official_code_gets_images_that_fit(memory: float, counts: list[int]) -> None:
    plan = gpu.Plan("cuda", memory, Path("POA"), all_widths=False)
    (steps,) = (part for part in plan.parts() if part.name == "step")
    ours = [case.name for case in steps.cases if case.name.endswith("ours")]
    assert ours == [f"vit-l16 {count} images ours" for count in (*counts, gpu.FEW_IMAGES)]
    official = [case.name for case in steps.cases if case.name.endswith("official")]
    assert official == [f"vit-l16 {count} images official" for count in counts if memory > 1e11 or count < 64]


def test_every_test_for_a_gpu_and_every_operator_has_a_part() -> None:
    parts = {part.name: part for part in gpu.Plan("cuda", 80e9, None, all_widths=False).parts()}
    assert tuple(parts) == gpu.PARTS
    tests = [case.name for case in parts["tests"].cases]
    assert tests[0] < "tests/kernels" and "tests/test_fast_path.py" in tests
    assert "tests/kernels/device/test_linear_kernels.py" in tests
    assert "tests/benchmarks/test_gpu_runner.py" not in tests
    assert {name for names in gpu.OPERATORS.values() for name in names} == {case.name for case in CASES}
    assert [case.name for case in parts["norms"].cases][:2] == [
        "layer_norm student 1024",
        "layer_norm student 640",
    ]


PROGRAM = """
import signal, sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from helpers import fake_parts
from benchmarks.journal import Journal
from benchmarks.runner import Runner
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    out = Path(sys.argv[1])
    Runner(Journal(out), 100.0).run([fake_parts.part(fake_parts.FINE, ("hangs", fake_parts.hangs))])
"""


def test_the_runner_is_ended(tmp_path: Path) -> None:
    """What was measured is on disk, and no process is left behind."""
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, program, out], env=environment) as process:
        end = time.monotonic() + 60
        while not (rows := out / "rows.jsonl").exists() or len(rows.read_text().splitlines()) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 3
    journal = Journal(out, resume=True)
    assert ops(journal) == ["fine", "before"]
    assert journal.finished() == {("fake", "fine")}
    with pytest.raises(ProcessLookupError):
        os.kill(journal.rows()[1]["pid"], 0)
