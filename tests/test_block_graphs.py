"""Steps whose blocks are replayed as CUDA graphs, on a CPU by a stand-in for these."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from elastic_kernels import ElasticBlock, GraphedModule, GraphPool, KeptRows
from helpers import fake_graphs, processes
from helpers.fake_graphs import FakePool
from helpers.run_folders import assert_same, newest, rows
from helpers.tiny import tiny_config, tiny_modern, tiny_pyramid
from poa.config import Config
from poa.errors import InputError
from poa.memory import memory_report
from poa.options import override
from poa.train import pretrain

GRAPHS = "performance.cuda_graphs=true"
LONG = ["performance.backward=apart", "method.optim.epochs=6", "method.backbone.max_depth=3"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_graphs.install(monkeypatch.setattr)


def both(config: Config, folder: Path) -> list[Path]:
    """The run without graphs and with them."""
    runs = [folder / "eager", folder / "graphs"]
    for run, options in zip(runs, ([], [GRAPHS]), strict=True):
        pretrain(override(config, options), run)
    return runs


def assert_same_state(a: Path, b: Path) -> None:
    """Bitwise, but for the options."""
    contents = [newest(run) for run in (a, b)]
    assert contents[0]["skipped"][0] < contents[0]["step"]
    assert_same(*({k: v for k, v in content.items() if k != "config"} for content in contents))
    assert rows(a) == rows(b)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(*LONG, "run.evaluate_every=5"),
        tiny_modern(*LONG, "method.micro_batches=2", "method.loss.features=1"),
        tiny_config(*LONG, "method.precision=bf16", "method.backbone.drop_path=0"),
        tiny_config(*LONG, "method.precision=fp16", "performance.optimizer=torch", "method.optim.epochs=10"),
    ],
    ids=["vit", "modern-micro-batches", "bf16", "fp16-torch"],
)
def test_runs_with_graphs_are_those_without(config: Config, tmp_path: Path, fake: None) -> None:
    """Bitwise: the plain definitions do the same sums in the same order."""
    eager, graphs = both(config, tmp_path)
    assert FakePool.counts["captures"] >= 5 and FakePool.counts["replays"] > 30
    assert_same_state(eager, graphs)


def test_a_resumed_run_is_the_whole_one(tmp_path: Path, fake: None) -> None:
    config = tiny_config(*LONG, GRAPHS, "run.save_every=5", "run.keep_last=9")
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "parts")
    for checkpoint in (tmp_path / "parts" / "checkpoints").iterdir():
        if "00005" not in checkpoint.name:
            checkpoint.unlink()
    FakePool.counts.clear()
    pretrain(config, tmp_path / "parts", resume=True)
    assert FakePool.counts["replays"]
    assert_same_state(tmp_path / "parts", tmp_path / "whole")


IN_PROCESSES = """
import sys
from pathlib import Path
from helpers import fake_graphs
from helpers.tiny import tiny_config
from poa.train import pretrain
fake_graphs.install()
pretrain(tiny_config(*sys.argv[2:]), Path(sys.argv[1]))
graphs = "performance.cuda_graphs=true" in sys.argv
assert (fake_graphs.FakePool.counts["replays"] > 20) == graphs, fake_graphs.FakePool.counts
"""


def test_two_processes_with_graphs_are_those_without(tmp_path: Path) -> None:
    """Bitwise; DDP puts gradients elsewhere twice, and must not reduce them before they are complete."""
    runs = [tmp_path / "eager", tmp_path / "graphs"]
    options = [*LONG, "method.optim.epochs=8", "method.micro_batches=4"]
    for run, more in zip(runs, ([], [GRAPHS]), strict=True):
        processes.run(2, "-c", IN_PROCESSES, str(run), *options, *more)
    assert_same_state(*runs)


UNDER_DDP = """
import torch
from elastic_kernels import ElasticBlock, GraphedModule
from helpers.fake_graphs import FakePool
from poa.distributed import init_distributed

class Graphed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ElasticBlock(32, 64, 16)
        graphed = GraphedModule(self.block, FakePool())
        self.run = lambda x: graphed(x, ((2, 3),))
    def forward(self, x):
        return self.run(x)

with init_distributed("cpu") as world:
    torch.manual_seed(0)
    model = Graphed()
    FakePool.held[:] = [lambda: [*model.parameters(), *(p.grad for p in model.parameters())]]
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for step in range(6):
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2 * step + world.rank))
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        wrapped(x.requires_grad_()).sin().sum().backward()
        sums = torch.cat([p.grad.flatten() for p in model.parameters()])
        other = sums.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(sums, other) and sums.any()
    assert FakePool.counts["replays"] > 3
    del model, wrapped
"""


def test_ddp_reduces_what_graphs_add() -> None:
    """Of a module that holds one, with nothing else that would tell DDP of its parameters."""
    processes.run(2, "-c", UNDER_DDP)


def graphed(held: list[torch.Tensor]) -> tuple[GraphedModule, ElasticBlock]:
    """A block whose graphs may read what is in the list."""
    block = ElasticBlock(32, 64, 16)
    FakePool.counts.clear()
    FakePool.held[:] = [lambda: [*block.parameters(), *(p.grad for p in block.parameters()), *held]]
    return GraphedModule(block, FakePool()), block


def kept(first: int) -> tuple[KeptRows, KeptRows]:
    """One of two sequences of three tokens."""
    rows = KeptRows(((1, 3),), torch.arange(3) + first, torch.full((3,), 2.0))
    return rows, rows


def call(module: GraphedModule | ElasticBlock, x: torch.Tensor, first: int) -> torch.Tensor:
    return module(x, ((2, 3),), kept(first))


def test_gradients_and_rows_of_every_call() -> None:
    """Also where gradients lie elsewhere than before, which is seen before they are added to."""
    module, block = graphed([])
    plain = ElasticBlock(32, 64, 16)
    plain.load_state_dict(block.state_dict())
    for number in range(8):
        if number == 5:
            for parameter in block.parameters():
                parameter.grad = parameter.grad.clone()
        x = torch.randn(6, 16)
        results = []
        for each in (module, plain):
            leaf = x.clone().requires_grad_()
            y = call(each, leaf, 3 * (number % 2))
            results.append(y.detach().clone())
            y.sin().sum().backward()
            results.append(leaf.grad)
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
        assert FakePool.counts["captures"] == (0 if number < 1 else 2 if number < 6 else 4)
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_wrong_orders_are_refused() -> None:
    module, block = graphed([])
    for _ in range(2):
        call(module, torch.randn(6, 16, requires_grad=True), 0).sum().backward()
    early = call(module, torch.randn(6, 16, requires_grad=True), 0)
    late = call(module, torch.randn(6, 16, requires_grad=True), 0)
    with pytest.raises(RuntimeError, match="expected one backward of a call, before the next call"):
        early.sum().backward()
    block.zero_grad()
    with pytest.raises(RuntimeError, match=r"expected .grad of parameters where they were in forward"):
        late.sum().backward()


def test_a_stand_in_for_graphs_finds_faults() -> None:
    """What waits for the device, and what is read but lies elsewhere."""
    FakePool.held.clear()
    for fault, message in (
        (lambda x: x * float(x.sum()), "waits"),
        (lambda x: x * TWO, "which nobody holds"),
    ):
        module = torch.nn.Module()
        module.forward = fault  # type: ignore[method-assign]
        faulty = GraphedModule(module, FakePool())
        faulty(torch.ones(2, 2))
        with pytest.raises(AssertionError, match=message):
            faulty(torch.ones(2, 2))


TWO = torch.full((2,), 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["performance.recompute=true"], "performance.recompute: expected false with"),
        (["performance.backward=together"], "performance.backward: expected auto or apart with"),
        (
            ["method.backbone.drop_path=0.1"],
            "method.backbone.drop_path: expected 0, or more than 0.1, .* got 0.1",
        ),
        (
            ["method.backbone.drop_path_uniform=false"],
            "method.backbone.drop_path_uniform: expected true with",
        ),
    ],
)
def test_what_has_no_graphs(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(GRAPHS, *options)


def test_other_backbones_have_no_graphs() -> None:
    with pytest.raises(InputError, match="method.backbone.kind: expected vit with .* got 'swin'"):
        tiny_pyramid("swin", GRAPHS)


def test_a_prediction_of_memory_says_what_it_leaves_out() -> None:
    lines = list(itertools.islice(memory_report(tiny_config(GRAPHS)), 3))
    assert lines[2].startswith("not predicted: performance.cuda_graphs")
    assert not any("cuda_graphs" in line for line in itertools.islice(memory_report(tiny_config()), 3))


def test_a_cpu_has_no_graphs(tmp_path: Path) -> None:
    message = "performance.cuda_graphs: expected a cuda device, got run.device cpu"
    with pytest.raises(InputError, match=message):
        pretrain(tiny_config(GRAPHS), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="GraphedModule: expected x on a cuda device, got cpu"):
        GraphedModule(ElasticBlock(32, 64, 16), GraphPool())(torch.zeros(2, 32), ((1, 2),))
