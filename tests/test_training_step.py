"""The step: orders of the backward, results that repeat, and no wait for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.launches import WAITS, Launches
from helpers.run_folders import assert_same, newest, run_of
from helpers.tiny import tiny_config
from poa import step as step_module
from poa import tribranch
from poa.checkpoint import RunFolder
from poa.config import Config
from poa.device import tensors_in
from poa.micro_batch import MicroBatch
from poa.optim import Schedules
from poa.step import TrainingState, train_step
from poa.subnets import Subnet
from poa.train import pretrain

APART = "performance.backward=apart"
WITH_MASKS = "method.optim.ibot_start_epoch=0"


def exact_micro_batch(config: Config, folder: Path, elastic: Subnet) -> MicroBatch:
    """The first micro-batch of a run in float64, with masks, stochastic depth and this elastic student."""
    run = run_of(config, folder)
    run.sampler.draw = lambda step, micro_batch: elastic  # type: ignore[method-assign]
    (canvases,) = next(run.batches(range(1)))
    micro_batch = run.prepare(0, 0, canvases)
    batch = micro_batch.batch
    assert len(batch.masks.indices) and micro_batch.passes[1].drop is not None
    exact = tribranch.Batch(batch.global_crops.double(), batch.local_crops.double(), batch.masks)
    return MicroBatch(exact, micro_batch.passes)


@pytest.mark.parametrize("recompute", ["false", "true"], ids=["stored", "recomputed"])
@pytest.mark.parametrize("elastic", [Subnet(16, 1), Subnet(32, 2)], ids=str)
def test_orders_of_backward_are_the_same_mathematics(
    elastic: Subnet, recompute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with iBOT, KoLeo and stochastic depth: every gradient and every term."""
    monkeypatch.setitem(tribranch.OPERANDS, "fp32", torch.float64)
    monkeypatch.setattr(tribranch.losses, "sinkhorn", exact_sinkhorn)
    changes = [WITH_MASKS, "method.optim.clip=0", "performance.optimizer=torch", "method.loss.features=1"]
    changes += [f"performance.recompute={recompute}", "method.backbone.drop_path=0.3"]
    results: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for order in ("performance.backward=together", APART):
        config = tiny_config(*changes, order)
        state = TrainingState.start(config, torch.device("cpu"))
        spread(state)
        schedules = Schedules.build(config.method.optim, 2, 8)
        micro_batch = exact_micro_batch(config, tmp_path, elastic)
        report = train_step(state.student, state, config, schedules, 0, [micro_batch], observed=True)
        gradients = {name: p.grad for name, p in state.student.named_parameters() if p.grad is not None}
        results.append(({**report.values, **report.health}, gradients))
    assert results[0][0].keys() == results[1][0].keys() and results[0][1].keys() == results[1][1].keys()
    assert float(results[0][0]["koleo"]) and float(results[0][0]["elastic.ibot.0"])
    for together, apart in zip(*results, strict=True):
        for name in together:
            limit = 1e-12 * float(together[name].abs().max())
            torch.testing.assert_close(apart[name], together[name], rtol=1e-9, atol=limit, msg=name)


def spread(state: TrainingState) -> None:
    """Weights in float64, far enough from their start that every gradient is well above rounding."""
    generator = torch.Generator().manual_seed(0)
    for network in (state.student.double(), state.teacher.double()):
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def exact_sinkhorn(logits: list[Tensor], temperature: float) -> list[tribranch.SoftTargets]:
    """Any fixed targets do; the operator's are float32."""
    return [tribranch.SoftTargets(t, t.new_zeros(t.shape[1]), temperature) for t in logits]


def test_apart_trains_the_same(tmp_path: Path) -> None:
    """Six steps of both orders from the same seed, as far as rounding allows."""
    for name, change in (("together", []), ("apart", [APART])):
        pretrain(tiny_config(*change), tmp_path / name)
    losses = [
        [row["loss"] for row in RunFolder(tmp_path / name).rows() if "loss" in row]
        for name in ("together", "apart")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_deterministic_runs_repeat_bitwise(tmp_path: Path) -> None:
    for name in ("first", "second"):
        pretrain(tiny_config("performance.deterministic=true"), tmp_path / name)
    assert not torch.are_deterministic_algorithms_enabled()
    ours, theirs = (newest(tmp_path / name) for name in ("first", "second"))
    for part in ("student", "teacher", "optimizer"):
        assert_same(ours[part], theirs[part])


@pytest.mark.parametrize("changes", [[], [APART], ["method.loss.targets=centering"]])
def test_nothing_waits_for_the_device(
    changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From micro-batches to gradients. (On a GPU the optimiser obeys a flag there; on a CPU it asks.)"""
    run = run_of(tiny_config(WITH_MASKS, "method.loss.features=1", *changes), tmp_path)
    (canvases,) = next(run.batches(range(1)))
    micro_batch = run.prepare(0, 0, canvases)
    none = torch.zeros(())
    monkeypatch.setattr(step_module, "update_weights", lambda *inputs: ({}, none))
    with Launches() as launches:
        train_step(run.model, run.state, run.config, run.schedules, 0, [micro_batch], observed=True)
    assert launches.total and not [wait for wait in WAITS if launches.counts[wait]]
    with Launches() as launches:
        bool(none)
    assert launches.counts["_local_scalar_dense"] == 1


def test_half_operands_keep_gradients_of_many_prototypes(tmp_path: Path) -> None:
    """One head of the paper's largest size and 12 images: the gradients of its weights are those of fp32
    operands but for the rounding of operands and targets, which moved them by 3e-5 to 3e-4; rounded
    gradients are 4e-3 away.
    """
    sizes = ["method.batch_size=12", "method.head.prototypes=65536", "method.head.bottleneck=256"]
    heads = {}
    for operands in ("fp32", "fp16"):
        run = run_of(tiny_config(WITH_MASKS, *sizes, f"method.loss.operands={operands}"), tmp_path)
        (canvases,) = next(run.batches(range(1)))
        train_step(run.model, run.state, run.config, run.schedules, 0, [run.prepare(0, 0, canvases)])
        heads[operands] = {name: p.grad for name, p in run.state.student.head.named_parameters()}
    for name, exact in heads["fp32"].items():
        assert exact is not None and exact.any()
        assert (heads["fp16"][name] - exact).norm() <= 1e-3 * exact.norm(), name


def test_every_tensor_of_a_micro_batch_is_handed_to_the_main_stream(tmp_path: Path) -> None:
    run = run_of(tiny_config(WITH_MASKS), tmp_path)
    (canvases,) = next(run.batches(range(1)))
    micro_batch = run.prepare(0, 0, canvases)
    batch, drops = micro_batch.batch, [p.drop for p in micro_batch.passes]
    halves = [half for drop in drops if drop for block in drop.blocks for half in block]
    assert len(halves) == 2 * sum(p.subnet.depth for p in micro_batch.passes)
    expected = [batch.global_crops, batch.local_crops, *vars(batch.masks).values()]
    expected += [tensor for half in halves for tensor in (half.rows, half.scale)]
    assert {id(t) for t in tensors_in([micro_batch])} == {id(t) for t in expected}
