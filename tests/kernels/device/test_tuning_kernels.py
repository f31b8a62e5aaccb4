"""Every setting that the search may choose, on a device: compiled, compared with the fallback, and timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import elastic_kernels as ek
from elastic_kernels import tune as search
from elastic_kernels import tuning
from helpers.kernels import group_norm_cases, prototype_cases, window_attention_cases
from helpers.kernels.numerics import draw
from helpers.kernels.sizes import SANITIZED, sized

pytestmark = pytest.mark.cuda

BF16 = torch.bfloat16
WIDTH, LARGEST, HEAD_DIM = 80, 140, 20
GROUPS = ((1, 70), (2, 35))
KEPT = GROUPS[0][0] * GROUPS[0][1]
TOKENS = KEPT + GROUPS[1][0] * GROUPS[1][1]


def block() -> None:
    """A block of a vision transformer as in training; rows are left out of its second half."""
    kept = ek.KeptRows(GROUPS[:1], torch.arange(KEPT).cuda(), torch.ones(KEPT).cuda())
    layer = ek.ElasticBlock(LARGEST, 2 * LARGEST, HEAD_DIM, layer_scale=0.5).cuda()
    x = draw(TOKENS, WIDTH).float().cuda().requires_grad_()
    with torch.autocast("cuda", BF16):
        layer(x, GROUPS, (None, kept)).sum().backward()


def qkv() -> None:
    shapes = (300, WIDTH), (3 * LARGEST, LARGEST), (3 * LARGEST,)
    x, weight, bias = (draw(*shape).to("cuda", BF16) for shape in shapes)
    ek.elastic_qkv(x, weight, bias)


def sums() -> None:
    """Of rows that tensor descriptors take."""
    x, weight, stream = (draw(*shape).cuda() for shape in [(300, WIDTH), (144, 144), (300, 144)])
    ek.elastic_linear_residual(x.to(BF16), weight.to(BF16), None, stream.float())


def windows() -> None:
    maps = sized([(16, 24, 24), (4, 56, 56)], [(2, 6, 9), (1, 14, 8)])
    leaves = [t.to("cuda", BF16) for t in window_attention_cases.inputs(maps, 7)]
    dout = draw(len(leaves[0]), 32).to("cuda", BF16)
    window_attention_cases.run((leaves[0], leaves[1].float(), leaves[2]), maps, 7, 3, dout, "triton")


def group_norm() -> None:
    shape = (3, 5, 7, 24)
    x, dy = (draw(*shape, seed=seed).to("cuda", BF16) for seed in (0, 1))
    parameters = (draw(shape[-1]).float().cuda(), draw(shape[-1]).float().cuda())
    group_norm_cases.run(x, parameters, 4, dy, "relu", dy, "triton")


def losses() -> None:
    case = prototype_cases.Case(130, 300, 72, teacher_rows=9)
    prototype_cases.run({name: t.cuda() for name, t in case.inputs(BF16, BF16).items()}, "triton")


STEPS: dict[str, tuple[Callable[[], None], set[str]]] = {
    "block": (block, {"gelu", "residual", "dgrad", "dgrad_act", "attention", "layer_norm"}),
    "qkv": (qkv, {"linear"}),
    "sums": (sums, {"residual_plain"}),
    "windows": (windows, {"window_attention"}),
    "group norm": (group_norm, {"group_norm"}),
    "losses": (losses, {"losses"}),
}


@pytest.mark.parametrize("step", sized(["windows", "sums"], list(STEPS)))  # `tune` itself compares
def test_all_settings_give_the_fallbacks_results(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kernels = STEPS[step]
    if SANITIZED:  # it executes one launch in the time of many, and loads no binary that could spill
        monkeypatch.setattr(search, "timed", lambda operator, milliseconds: [1.0])
        monkeypatch.setattr(search, "launched", lambda: nullcontext([]))
        monkeypatch.setattr(tuning, "gpu_name", lambda device: "sanitizer")
    with search.record() as calls:
        run()
    device = torch.device("cuda", 0)
    lines = list(search.tune(calls, tmp_path / "table.json", 20, device))
    print(*lines, sep="\n")
    assert not [line for line in lines if "differs" in line or (SANITIZED and "left out" in line)]
    entries = tuning.read(tmp_path / "table.json", tuning.header(device))
    assert {entry.key.kernel.removesuffix("_fwd").removesuffix("_bwd") for entry in entries} == kernels
    assert SANITIZED or all(0 < entry.us <= entry.fallback_us and entry.samples > 1 for entry in entries)
