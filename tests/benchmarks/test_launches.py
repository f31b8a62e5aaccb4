"""Launches of a step, found on meta tensors through the launchers of a GPU that nobody has."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import launches
from benchmarks.__main__ import main
from elastic_kernels import dispatch, elastic_linear
from elastic_kernels.dispatch import planning
from helpers.tiny import VIT, tiny_config
from poa.options import override

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter has no launches to record")

SUMMARY = {"launches", "triton", "cublas", "cudnn", "graph", "other", "other_gb", "host_ms"}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_operators_are_counted_with_what_they_read_and_write() -> None:
    a, b = meta(256, 64), meta(64, 32, dtype=torch.bfloat16)
    with launches.Operators() as operators:
        a[:, :16].t()  # views launch nothing
        a.add_(a[:1])
        (a[:, :32] @ meta(32, 8)).reshape(8, 256)
        meta(8, 16).t().reshape(128)  # copies
        b.copy_(a[:64, :32])
        torch.arange(8)  # on the CPU
    rows = {
        name: (kind, count, operators.bytes[kind, name]) for (kind, name), count in operators.launches.items()
    }
    assert rows == {
        "add_": ("other", 1, 4 * (2 * 256 * 64 + 64)),
        "mm": ("cuBLAS", 1, 4 * (256 * 32 + 32 * 8 + 256 * 8)),
        "clone": ("other", 1, 4 * 2 * 128),
        "copy_": ("other", 1, (4 + 2) * 64 * 32),
    }


def test_operators_inside_of_ours_are_counted() -> None:
    """A product that cuBLAS runs casts its bias."""
    x, weight, bias = meta(64, 32, dtype=torch.bfloat16), meta(16, 32, dtype=torch.bfloat16), meta(16)
    with launches.absent_gpu() as made, planning(torch.bfloat16), launches.Operators() as operators:
        elastic_linear(x, weight, bias)
        elastic_linear(x, weight, bias, activation="gelu")
    assert operators.launches == {("cuBLAS", "addmm"): 1, ("other", "_to_copy"): 1}
    assert [(launch.binary.name, launch.programs) for launch in made.made] == [("_linear_fwd_kernel", 1)]


def test_python_shapes_are_back_afterwards() -> None:
    def in_python() -> list[bool]:
        tables = [torch._C._dispatch_dump_table(f"aten::{name}") for name in ("exp", "addmm", "convolution")]
        return [".py:" in line for table in tables for line in table.splitlines() if line.startswith("Meta:")]

    assert in_python() == [True, True, True]
    with launches.native_shapes():
        assert in_python() == [False, False, True]
        assert (meta(3, 1).exp() + meta(1, 2)).shape == (3, 2)
    assert in_python() == [True, True, True]


@pytest.mark.parametrize("name", ["quickstart-swin", "quickstart-resnet"])
def test_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launches", "seed=1", "--preset", name, "method.batch_size=4"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert summary.keys() == SUMMARY
    assert summary["launches"] == sum(summary[kind] for kind in ("triton", "cublas", "cudnn", "other"))
    assert summary["launches"] == sum(int(line.split()[1].replace(",", "")) for line in table[1:])
    assert any("_crops_finish_kernel" in line for line in table)
    assert any("_adamw_kernel" in line for line in table)
    assert not any("_foreach_copy_" in line for line in table)  # the optimiser rounds the weights


def test_a_deeper_subnet_launches_more() -> None:
    config = tiny_config()
    space = config.method.backbone.space
    few, many = (launches.run(config, subnet, repeats=1)[1] for subnet in (space.smallest, space.intact))
    assert few["triton"] < many["triton"]
    assert few["host_ms"] > 0


def test_graphs_are_launched_instead_of_what_they_hold() -> None:
    """Forward of the teacher, forward and backward of both students."""
    config = tiny_config("method.backbone.max_depth=3", "method.backbone.drop_path=0.2")
    _, plain = launches.run(config, config.method.backbone.space.intact, repeats=1)
    config = override(config, ["performance.cuda_graphs=true"])
    table, graphs = launches.run(config, config.method.backbone.space.intact, repeats=1)
    assert (plain["graph"], graphs["graph"]) == (0, 5) and any("graph" in line for line in table)
    assert graphs["triton"] < plain["triton"] and graphs["launches"] < plain["launches"]


def test_a_subnet_outside_of_the_space_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launches", "quickstart", *VIT, "--subnet", "48x9"]) == 1
    assert "48x9" in capsys.readouterr().err
