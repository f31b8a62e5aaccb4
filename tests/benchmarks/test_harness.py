"""The harness: its gate, its timing, what it writes; every case on a CPU; the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import cases, harness, results
from benchmarks.accuracy import excess_error
from benchmarks.failures import DeviceLost, Refused, Trying, Unavailable
from benchmarks.harness import Problem
from benchmarks.peers import naive
from benchmarks.roofline import Ceilings
from elastic_kernels import ElasticBlock, ElasticBottleneck, ElasticSwinBlock, KeptRows
from helpers.compiler import HAS_COMPILER

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e12, 1e11, None, "made up for a test")
ROOT = Path(__file__).parent.parent.parent


def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def problem(**more: Callable[[], harness.Provider]) -> Problem:
    leaves = {"x": cases.draw(CPU, torch.float32, 5, 7), "w": cases.draw(CPU, torch.float32, 7, seed=1)}
    moved = dict.fromkeys(harness.MODES, 280.0)
    return Problem(
        "scale", "5x7", leaves, {"ours": lambda: scaled, "naive": lambda: scaled, **more}, 35.0, moved
    )


def measured(
    problem: Problem, only: Sequence[str] = (), seconds: float = 0.001
) -> tuple[list[results.Row], dict[str, str]]:
    """Rows, and why the other providers have none."""
    events = list(harness.run(problem, CEILINGS, only, seconds))
    refused = {event.provider: event.reason for event in events if isinstance(event, Refused)}
    return [event for event in events if isinstance(event, dict)], refused


def wrong_forward(x: Tensor, w: Tensor) -> Tensor:
    return x * w * 1.001


def wrong_gradient(x: Tensor, w: Tensor) -> Tensor:
    return x * w.detach() + (w - w.detach()) * 0


def crashing(x: Tensor, w: Tensor) -> Tensor:
    raise IndexError("out of range")


def missing() -> harness.Provider:
    raise Unavailable("it is not installed")


def test_nan_of_pytorch_allows_no_error() -> None:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torchs = torch.tensor([1.0, torch.nan], dtype=torch.float16)
    assert excess_error(truth.half(), torchs, truth) is None
    assert "worst element 1" in str(excess_error(torchs, torchs, truth))
    assert "worst element 0" in str(excess_error((truth + 0.1).half(), torchs, truth))


def test_gate_refuses_wrong_kernels_and_lists_missing_peers() -> None:
    more = {"off": wrong_forward, "gradless": wrong_gradient, "crashing": crashing}
    providers = {name: (lambda function=function: function) for name, function in more.items()}
    rows, refused = measured(problem(**providers, absent=missing))
    assert {row["provider"] for row in rows} == {"ours", "naive"}
    assert refused["off"].startswith("output: worst element")
    assert refused["gradless"].startswith("dw: worst element")
    assert refused["crashing"] == "IndexError: out of range"
    assert refused["absent"] == "it is not installed"


def test_a_provider_that_fails_while_it_is_timed_loses_only_what_it_has_not_measured() -> None:
    calls = iter(range(1000))

    def tiring(x: Tensor, w: Tensor) -> Tensor:
        if next(calls) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it")
        return x * w

    rows, refused = measured(problem(tiring=lambda: tiring), seconds=0.05)
    assert [row["mode"] for row in rows if row["provider"] == "ours"] == list(harness.MODES)
    assert refused == {"tiring": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."}


def test_a_provider_after_which_the_device_is_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    events = harness.run(problem(crashing=lambda: crashing), CEILINGS, seconds=0.001)
    with pytest.raises(DeviceLost, match="out of range") as raised:
        list(events)
    assert raised.value.provider == "crashing"


def test_providers_are_announced_and_left_out() -> None:
    events = list(harness.run(problem(crashing=lambda: crashing), None, seconds=0.001, without=["ours"]))
    assert [e.provider for e in events if isinstance(e, Trying)] == ["naive", "crashing", ""]
    assert {e["provider"] for e in events if isinstance(e, dict)} == {"naive"}


def test_rows() -> None:
    rows, _ = measured(problem())
    assert [row["mode"] for row in rows] == ["fwd", "fwd", "bwd", "bwd", "fwd+bwd", "fwd+bwd"]
    for row in rows:
        assert all(key in row for key in results.REQUIRED)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["device"] == "cpu"
        assert row["gb_per_s"] == pytest.approx(280 / row["p50"] / 1e3)
        assert row["share_of_floor"] == pytest.approx(280 / 1e11 / (row["p50"] / 1e6), rel=0.05)
        assert row["unhidden"] == 0
        assert results.line(row).startswith(f"scale 5x7  {row['provider']}")
        json.dumps(row)


def test_a_slow_provider_is_slow() -> None:
    def slow(x: Tensor, w: Tensor) -> Tensor:
        time.sleep(0.002)
        return x * w

    rows, _ = measured(problem(slow=lambda: slow), seconds=0.01)
    spent = {(row["provider"], row["mode"]): row["p50"] for row in rows}
    assert spent["slow", "fwd"] > 2000 > spent["ours", "fwd"]
    assert spent["slow", "bwd"] < 2000  # its forward is not part of the backward


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_case_passes_its_gate(case: cases.Case) -> None:
    for make in case.problems(CPU, cases.TINY):
        rows, refused = measured(make(), only=("ours", "naive", "packed", "padded", "grouped_mm", "linear"))
        assert {"ours", "naive"} <= {row["provider"] for row in rows}
        assert not refused


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_compiled_slicing_and_the_reasons_of_absent_peers() -> None:
    """On a CPU the compiled peer runs, and each of the others says why it does not."""
    if torch.cuda.is_available():
        pytest.skip("about the machine without a GPU")
    (first, *_) = next(c for c in cases.CASES if c.name == "attention").problems(CPU, cases.TINY)
    rows, refused = measured(first())
    assert {row["provider"] for row in rows} == {"ours", "naive", "compiled"}
    expected = {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "varlen", "flex", "xformers", "flash4"}
    assert refused.keys() == expected
    assert all("CUDA" in reason or "not installed" in reason for reason in refused.values())


@pytest.mark.parametrize("width", [16, 32])
def test_naive_block_is_the_block(width: int) -> None:
    block = ElasticBlock(32, 128, 16, layer_scale=0.3)
    rows = torch.tensor([5, 6, 7, 8, 9])
    kept = KeptRows(((1, 5),), rows, torch.full((5,), 2.0))
    x = cases.draw(CPU, torch.float32, 10, width)
    for choice in (None, (kept, kept)):
        expected = block(x, [(2, 5)], choice)
        with naive.installed() as graphs:
            torch.testing.assert_close(block(x, [(2, 5)], choice), expected)
            assert graphs() == 0
        assert torch.equal(block(x, [(2, 5)], choice), expected)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("shift", [0, 1])
def test_naive_swin_block_is_the_block(width: int, shift: int) -> None:
    block = ElasticSwinBlock(32, 128, 16, 3, shift)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    kept = KeptRows(((1, 20), (1, 9)), torch.arange(20, 49), torch.full((29,), 2.0))
    maps = [(2, 5, 4), (1, 3, 3)]
    x = cases.draw(CPU, torch.float32, 49, width)
    for choice in (None, (kept, kept)):
        expected = block(x, maps, choice)
        with naive.installed():
            torch.testing.assert_close(block(x, maps, choice), expected)
        assert torch.equal(block(x, maps, choice), expected)


@pytest.mark.parametrize("middle", [8, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_naive_bottleneck_is_the_block(middle: int, stride: int) -> None:
    block = ElasticBottleneck(12, 16, 24, 4, stride=stride, shortcut=True)
    x = cases.draw(CPU, torch.float32, 3, 6, 6, 12)
    expected = block(x, middle)
    with naive.installed():
        torch.testing.assert_close(block(x, middle), expected)
    assert torch.equal(block(x, middle), expected)


def test_kernels_command_writes_no_rows_without_a_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("about the machine without a GPU")
    out = tmp_path / "rows.jsonl"
    arguments = ["kernels", "--case", "qkv", "--provider", "ours", "--seconds", "0.001", "--out", str(out)]
    assert command.main(arguments) == 0
    said, *table = capsys.readouterr().out.splitlines()
    assert said.startswith("without a GPU: tiny sizes and") and said.endswith("; no row is written")
    assert any("qkv" in line for line in table)
    assert not out.exists()


def test_wrong_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["kernels", "--case", "softmax", "--seconds", "0.001"]) == 1
    assert "expected one of layer_norm, attention" in capsys.readouterr().err
    assert command.main(["kernels", "--device", "tpu"]) == 1
    assert "expected auto, cpu, cuda or cuda:N, got 'tpu'" in capsys.readouterr().err
    assert command.main(["step", "--official", str(tmp_path), "--seconds", "0.001"]) == 1
    assert "expected a checkout of github.com/alipay/POA" in capsys.readouterr().err
    arguments = ["gpu", "--device", "cpu", "--out", str(tmp_path / "out"), "--official", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "expected a checkout of github.com/alipay/POA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the machine without a GPU")
def test_a_session_needs_a_gpu_or_is_a_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu"]) == 1
    assert capsys.readouterr().err.startswith("benchmarks: gpu: expected a CUDA device, got none")


def test_list_and_help_explain_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for case in cases.CASES:
        assert f"{case.name:16} {case.about}" in listed
    with pytest.raises(SystemExit):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"{name:12}" in printed for name in command.COMMANDS)


def test_kernel_cases_run_under_pytest_benchmark(tmp_path: Path) -> None:
    """`pytest benchmarks --benchmark-save`."""
    pytest.importorskip("pytest_benchmark")
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"}
    options = ["-q", "-k", "layer_norm-0 and ours and not bwd", "-p", "no:cacheprovider"]
    options += [f"--benchmark-storage={tmp_path}", "--benchmark-max-time=0.05", "--benchmark-save=before"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    (saved,) = tmp_path.rglob("*_before.json")
    assert [b["group"] for b in json.loads(saved.read_text())["benchmarks"]] == ["layer_norm-0 fwd"]


def test_sizes_are_those_of_the_step() -> None:
    """51 of 64 images' global crops and 409 of 512 local ones are kept at a rate of 0.2."""
    assert cases.REAL.crops["student"] == ((102, 197), (409, 37))
    assert dataclasses.asdict(cases.REAL)["largest"] == 1024
