"""Compiling before a run, and counting what is compiled in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.launches import step_of
from elastic_kernels import compilations
from elastic_kernels.dispatch import INTERPRETED
from helpers.tiny import tiny_config, tiny_pyramid
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.memory import planned_state
from poa.optim import Schedules
from poa.step import train_step
from poa.train import pretrain
from poa.warmup import micro_batch_of, noise, warm_up, warm_up_absent

triton = pytest.importorskip("triton")
JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction
CUDA = torch.cuda.is_available()


def test_only_what_the_cache_lacks_is_counted() -> None:
    heard = []
    knobs = triton.knobs.compilation
    assert knobs.listener is None
    knobs.listener = lambda **event: heard.append(event["cache_hit"])
    try:
        with compilations() as compiled:
            for hit in (True, False, True, False):
                knobs.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
        knobs.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=False)
    finally:
        knobs.listener = None
    assert compiled.count == 2
    assert heard == [True, False, True, False, False]  # who listened before still does


def test_a_run_tells_what_it_compiled_and_its_host_time(tmp_path: Path) -> None:
    pretrain(tiny_config(), tmp_path)
    rows = [row for row in RunFolder(tmp_path).rows() if "loss" in row]
    assert all(row["compilations"] == 0 and row["host_ms"] > 0 for row in rows)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="where no kernel runs")
def test_a_device_without_kernels_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--preset", "quickstart", "run.device=cpu"]) == 2
    assert "expected a device that runs Triton kernels, got cpu" in capsys.readouterr().err


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_for_an_absent_gpu_are_those_that_triton_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own launches of other steps find every kernel in the folder."""
    from elastic_kernels import absent_gpu

    config = tiny_config("method.backbone.min_width=32")
    compiles, run = JITFunction._do_compile, JITFunction.run
    *kernels, last = warm_up_absent(config, "sm_90", tmp_path, triton_key="another Python's")
    assert f"Triton {triton.__version__} of the given key" in last
    hits: list[bool] = []

    def compile_only(kernel: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> object:
        return run(kernel, *args, warmup=True, **kwargs)

    intact = config.method.backbone.space.intact
    with absent_gpu("sm_90"), monkeypatch.context() as patch, step_of(config, intact) as step:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path))
        patch.setattr(triton.runtime.cache, "triton_key", lambda: "another Python's")
        patch.setattr(triton.knobs.compilation, "listener", lambda cache_hit, **event: hits.append(cache_hit))
        patch.setattr(JITFunction, "_do_compile", compiles)
        patch.setattr(JITFunction, "run", compile_only)
        step()
    assert all(hits) and len(hits) > len(kernels) / 2


def test_an_unknown_absent_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--preset", "quickstart", "--arch", "90"]) == 2
    assert "--arch: expected one of sm_80, sm_86, " in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_nothing_is_compiled_after_a_warm_up(kind: str, precision: str, tmp_path: Path) -> None:
    """By steps of all subnets and by an evaluation."""
    changes = [
        "run.device=cuda",
        "run.evaluate_every=12",
        "method.optim.epochs=12",
        f"method.precision={precision}",
    ]
    config = tiny_config(*changes) if kind == "vit" else tiny_pyramid(kind, *changes)
    lines = list(warm_up(config))
    assert len(lines) == len(config.method.backbone.space.widths)
    pretrain(config, tmp_path)
    rows = [row for row in RunFolder(tmp_path).rows() if "compilations" in row]
    assert rows and not any(row["compilations"] for row in rows)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches to find")
def test_steps_of_one_subnet_ask_triton_once() -> None:
    """Whatever the masks, the crops that stochastic depth keeps, and the schedules."""
    from elastic_kernels import absent_gpu
    from elastic_kernels.triton_ops.launching import LaunchedKernel

    config = tiny_config("method.optim.epochs=10", "method.precision=bf16")
    schedules = Schedules.build(config.method.optim, 1, config.method.batch_size)
    state, counts = planned_state(config), []
    with absent_gpu("sm_90") as launches, state.undisturbed():
        for step in range(1, 7):
            seeded = replace(config, method=replace(config.method, seed=step))
            intact = config.method.backbone.space.intact
            micro_batch = micro_batch_of(noise(config), seeded, state, intact, masked=True)
            train_step(state.student, state, config, schedules, step, [micro_batch])
            kernels = {launch.binary.kernel for launch in launches.made}
            counts.append(sum(len(kernel.known) for kernel in kernels if isinstance(kernel, LaunchedKernel)))
    assert counts[0] > 30 and counts[1:] == counts[1:2] * 5
