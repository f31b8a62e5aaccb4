"""Training with the kernels against training without them, from the same seed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastic_kernels import backend
from elastic_kernels.dispatch import INTERPRETED
from helpers import fake_graphs
from helpers.launches import WAITS, Launches, launches
from helpers.run_folders import TIMINGS, assert_same, newest, run_of
from helpers.tiny import tiny_config, tiny_pyramid
from poa import device
from poa.checkpoint import RunFolder
from poa.config import Config
from poa.micro_batch import MicroBatch
from poa.network import Batch
from poa.options import override
from poa.presets import preset
from poa.step import TrainingState, accumulate_gradients, autocast, train_step
from poa.subnets import Subnet
from poa.train import pretrain
from poa.tribranch import OPERANDS, Targets, teacher_targets
from poa.warmup import warm_up

CUDA = torch.cuda.is_available()
# Three interpreted steps differ by at most 3.2e-6 of a loss, and by 1.0e-4 in weights (of a Swin; of a ViT by
# 3.3e-5): AdamW divides small gradients by themselves. A GPU adds in other orders.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 3e-4
# What rounding alone does in 200 steps, measured with one and two CPU threads and three seeds: 0.31 % of the
# mean loss of 20 steps, 3.3 points of a k-NN accuracy.
STEPS, CURVE_TOLERANCE, KNN_TOLERANCE = 300, 0.01, 0.033


def train(config: Config, out: Path, name: str) -> list[dict]:
    with backend(name):
        pretrain(config, out)
    return RunFolder(out).rows()


SIZES = ["method.batch_size=4", "method.crops.local_count=1", "method.optim.epochs=1.5"]
SIZES += [f"run.device={'cuda' if CUDA else 'cpu'}"]
FEW = ["method.batch_size=2"]
SMALL = [*FEW, "method.backbone.image_size=16", "method.crops.global_size=16"]
SMALL += ["method.backbone.mask_scale=4"]
SHALLOW = ["method.backbone.max_depths=1,1,2"]


@pytest.mark.cuda(or_interpreted=True)
@pytest.mark.parametrize(
    "config",
    [
        tiny_config(*SIZES, *FEW),
        tiny_config(*SIZES, *FEW, "performance.recompute=true", "performance.keep_activations=true"),
        tiny_pyramid("swin", *SIZES, *SMALL, *SHALLOW, "method.backbone.drop_path=0.2"),
        tiny_pyramid("resnet", *SIZES, *SMALL, *SHALLOW),
    ],
    ids=["vit", "vit-recomputed-kept", "swin", "resnet"],
)
def test_three_steps(config: Config, tmp_path: Path) -> None:
    """Losses, norms and weights; the second step trains the prototypes, the third has masks."""
    runs = {name: train(config, tmp_path / name, name) for name in ("reference", "triton")}
    plain, fused = ([row for row in rows if "loss" in row] for rows in runs.values())
    assert [row["step"] for row in fused] == [1, 2, 3] and fused[2]["intact.ibot.0"] > 0
    for ours, theirs in zip(fused, plain, strict=True):
        for name in theirs.keys() - {*TIMINGS, "subnets"}:
            assert math.isclose(ours[name], theirs[name], rel_tol=LOSS_TOLERANCE, abs_tol=1e-6), name
    for branch in ("student", "teacher"):
        networks = [RunFolder(tmp_path / name).network(branch)[0] for name in runs]
        for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=WEIGHT_TOLERANCE)


def gradients(
    config: Config, micro_batch: MicroBatch, targets: Targets, name: str, exact: bool
) -> dict[str, Tensor]:
    """Of every parameter, by a backend in the precision of the configuration, or in float64."""
    device = micro_batch.batch.global_crops.device
    state = TrainingState.start(config, device)
    spread(state, exact)
    state.scaler = torch.amp.GradScaler(device.type, init_scale=64.0, enabled=state.scaler.is_enabled())
    with backend(name):
        accumulate_gradients(state.student, state, config, micro_batch, targets, 1.0)
    scale = state.scaler.get_scale()
    return {key: p.grad / scale for key, p in state.student.named_parameters() if p.grad is not None}


def spread(state: TrainingState, exact: bool) -> None:
    """Weights far enough from their start that no gradient is small by symmetry."""
    generator = torch.Generator().manual_seed(0)
    for parameter in state.student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    if exact:
        state.student.double()


@pytest.mark.cuda(or_interpreted=True)
@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_low_precision_gradients(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both students' losses, with masks: as good as PyTorch's in fp16 against float64.

    Errors of a network's tensors have common causes, so their norms are compared: of the ratios to PyTorch's
    the largest was 2.0, the geometric mean 0.84 to 1.00.
    """
    sizes = ["method.precision=fp16", "method.optim.ibot_start_epoch=0", *SIZES]
    config = tiny_config(*sizes) if kind == "vit" else tiny_pyramid(kind, *sizes, *SMALL)
    run = run_of(config, tmp_path)
    (canvases,) = next(run.batches(range(1)))
    micro_batch = run.prepare(0, 0, canvases)
    batch, schedules = micro_batch.batch, run.schedules
    with backend("reference"), autocast(batch.global_crops.device, config.method.precision):
        (targets,) = teacher_targets(
            run.state.teacher,
            [batch],
            schedules.teacher_temperature[0],
            config.method.loss,
            run.state.centers,
        )
    actual = {name: gradients(config, micro_batch, targets, name, False) for name in ("reference", "triton")}
    double = Batch(batch.global_crops.double(), batch.local_crops.double(), batch.masks)
    monkeypatch.setitem(OPERANDS, "fp32", torch.float64)
    exact = override(config, ["method.precision=fp32"])
    truth = gradients(exact, MicroBatch(double, micro_batch.passes), targets, "reference", True)
    ours, theirs = (
        {key: float((gradient.double() - truth[key]).norm()) for key, gradient in actual[name].items()}
        for name in ("triton", "reference")
    )
    ratios = {key: ours[key] / theirs[key] for key in truth}
    assert max(ratios.values()) < 3, max(ratios.items(), key=lambda item: item[1])
    assert math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios)) < 1.5


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_steps_with_graphs(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those without, but for the sums for biases of the last block of a graph, made in other parts."""
    fake_graphs.install(monkeypatch.setattr)
    sizes = [*FEW, "method.crops.local_count=1", "method.optim.epochs=2.5", "method.backbone.min_depth=2"]
    runs = []
    for graphs in ("false", "true"):
        options = [f"method.precision={precision}", "performance.backward=apart", "run.device=cpu"]
        config = tiny_config(*sizes, *options, f"performance.cuda_graphs={graphs}")
        with backend("triton"):
            run = run_of(config, tmp_path)
            run.state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
            for step, canvases in enumerate(run.batches(range(5))):
                report = run.step(step, canvases)
                assert report.finite
        runs.append(run.state)
    assert fake_graphs.FakePool.counts["captures"] >= 5 and fake_graphs.FakePool.counts["replays"] >= 15
    for branch in ("student", "teacher"):
        networks = [getattr(state, branch).parameters() for state in runs]
        for ours, theirs in zip(*networks, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.cuda
def test_steps_with_graphs_on_a_gpu(tmp_path: Path) -> None:
    """Three subnets, twelve steps, with and without graphs: the losses."""
    losses = []
    for graphs in ("false", "true"):
        options = ["run.device=cuda", "method.backbone.max_depth=3", "method.optim.epochs=6"]
        config = tiny_config(*options, f"performance.cuda_graphs={graphs}")
        losses.append([row["loss"] for row in train(config, tmp_path / graphs, "triton") if "loss" in row])
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_warm_up_reaches_every_width() -> None:
    """Under the interpreter, where nothing is compiled: the steps themselves."""
    shallow = ["method.batch_size=2", "method.crops.local_count=1", "method.backbone.max_depth=1"]
    config = tiny_config(*shallow, "run.device=cpu")
    with backend("triton"):
        lines = list(warm_up(config))
    assert [line.split()[1] for line in lines] == [f"{w}:" for w in config.method.backbone.space.widths]


@pytest.mark.cuda
def test_many_steps_on_digits(tmp_path: Path) -> None:
    """Each seed's loss curve, and k-NN averaged over three seeds."""
    changes = ["run.device=cuda", "run.log_every=20", "method.optim.warmup_epochs=1"]
    changes += [f"run.evaluate_every={STEPS}", f"method.optim.epochs={STEPS / 21:.4f}"]
    scores: dict[str, dict[str, float]] = {"reference": {}, "triton": {}}
    for seed in range(3):
        config = override(preset("quickstart"), [*changes, f"method.seed={seed}"])
        curves = []
        for name, sums in scores.items():
            rows = train(config, tmp_path / f"{name}-{seed}", name)
            curves.append([row["loss"] for row in rows if "loss" in row])
            last = [row["knn"] for row in rows if "knn" in row][-1]
            sums |= {subnet: sums.get(subnet, 0) + score / 3 for subnet, score in last.items()}
        assert len(curves[1]) == STEPS // 20
        assert curves[1] == pytest.approx(curves[0], rel=CURVE_TOLERANCE)
    assert scores["triton"] == pytest.approx(scores["reference"], abs=KNN_TOLERANCE)


@pytest.mark.cuda
def test_input_made_beside_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as with everything on one stream."""
    config = tiny_config("run.device=cuda", "performance.deterministic=true")
    pretrain(config, tmp_path / "beside")
    monkeypatch.setattr(device, "side_stream", lambda *_: None)
    pretrain(config, tmp_path / "after")
    assert_same(*(newest(tmp_path / name)["student"] for name in ("beside", "after")))


def launched(name: str, folder: Path, depth: int, elastic: int) -> Launches:
    """By a step of a network so deep, with an elastic student so deep, on a backend."""
    changes = ["method.batch_size=2", "method.crops.local_count=1", "method.optim.ibot_start_epoch=0"]
    config = tiny_config(*changes, f"method.backbone.max_depth={depth}")
    with backend(name):
        run = run_of(config, folder)
        run.sampler.draw = lambda step, micro_batch: Subnet(16, elastic)  # type: ignore[method-assign]
        (canvases,) = next(run.batches(range(1)))
        micro_batch = run.prepare(0, 0, canvases)
        for _ in range(2):  # the first one sets up
            with launches() as counts:
                train_step(run.model, run.state, run.config, run.schedules, 0, [micro_batch])
    return counts


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_launches_and_waits_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a block of each branch adds to a step, and that nothing waits for the device.

    The official step of ViT-L/16, traced alike, has 12,563 launches: about 300 for each of its 24 + 18
    blocks.
    """
    blocks = {}
    for name in ("reference", "triton"):
        few, deep, deeper = (launched(name, tmp_path, *depths) for depths in ((2, 1), (3, 1), (3, 2)))
        blocks[name] = (deep.total - few.total, deeper.total - deep.total)
        with capsys.disabled():
            print(
                f"\n{name}: {few.total} launches, a block of teacher and intact student adds "
                f"{blocks[name][0]}, one of the elastic student {blocks[name][1]}"
            )
    assert not [wait for wait in WAITS if deeper.counts[wait]]
    assert blocks["triton"][0] <= 48 and blocks["triton"][1] <= 55
    assert blocks["reference"][0] > 4 * blocks["triton"][0]
    assert blocks["reference"][1] > 2 * blocks["triton"][1]
