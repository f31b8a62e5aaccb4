"""The Triton linear layers and half-blocks on a device."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels import backend
from helpers.kernels.linear_cases import (
    FREE_FORMS,
    HALVES,
    Case,
    assert_accurate,
    assert_same_in_place,
    assert_same_kept,
    forms,
    free_cases,
    run,
    with_persistent_programs,
)
from helpers.kernels.numerics import DTYPES, assert_all_as_good, assert_as_good_as_torch, draw
from helpers.kernels.sizes import RUNS, gpu_only, sized

pytestmark = pytest.mark.cuda

CASES = sized(
    {
        "narrowest": Case(4099, 384, 384, spare=640, head_dim=64),
        "intact": Case(2051, 1024, 1024, spare=0, head_dim=64),
        "kept": Case(3001, 640, 640, kept=3001, spare=384, head_dim=64),
        "odd": Case(257, 97, 129),
        "free": Case(257, 200, 320, kept=257, head_dim=80, heads=4, hidden=333, scale=None),
    },
    {
        "narrowest": Case(135, 80, 140),
        "intact": Case(131, 96, 200, spare=0, head_dim=32),
        "kept": Case(133, 96, 96, kept=133, spare=64, head_dim=32),
        "odd": Case(137, 97, 129),
        "free": Case(133, 72, 96, kept=133, head_dim=48, heads=2, hidden=131, scale=None),
    },
) | {"one-row": Case(1, 16, 5), "no-rows": Case(0, 16, 16), "none-kept": Case(0, 16, 16, kept=0)}


compare = partial(assert_accurate, device="cuda", runs=RUNS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, case in CASES.items() for form in forms(case)]
)
def test_forward_and_gradients(name: str, form: str, dtype: torch.dtype) -> None:
    compare(CASES[name], form, dtype)


@pytest.mark.parametrize("form", FREE_FORMS)
def test_every_combination_of_scale_hidden_units_and_heads(form: str) -> None:
    for case in free_cases(form):
        compare(case, form, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("form", ["linear-act", "mlp", "swiglu"])
def test_activations(form: str, activation: str, dtype: torch.dtype) -> None:
    compare(Case(sized(257, 133), 97, 129, scale=None, activation=activation), form, dtype)


@pytest.mark.parametrize(
    ("form", "activation"), [("mlp", "silu"), ("mlp-half", "gelu"), ("head-mlps", "gelu")]
)
def test_activations_that_are_kept(form: str, activation: str) -> None:
    assert_same_kept(Case(sized(257, 133), 97, 129, activation=activation), form, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("form", "kept"), [("qkv-bias", None), ("residual-gamma", 133), ("mlp-half", 133), ("mlp", None)]
)
def test_wide_tiles(form: str, kept: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 columns, or of 192 with a GELU; fp32 has none."""
    monkeypatch.setattr("elastic_kernels.triton_ops.linear_dgrad.LONG", 1)
    compare(Case(133, 240, 480, kept=kept), form, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [(256, 4, 1), (128, 3, 2)], ids=str)
def test_persistent_programs(
    tile: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which load by tensor descriptors; rows that those do not take are left to the other kernel."""
    columns, stages, programs = tile
    launches = with_persistent_programs(
        monkeypatch, block_m=128, block_n=columns, block_k=64, warps=8, stages=stages, persistent=programs
    )
    for form, kept in (("residual-gamma", None), ("mlp", None), ("mlp-half", sized(8001, 300))):
        compare(Case(sized(8001, 300), sized(640, 264), sized(640, 328), kept=kept), form, dtype)
    assert len(launches) >= 5 * RUNS and sum(backward for _, backward in launches) == RUNS
    assert_same_kept(Case(sized(8001, 300), sized(640, 264), sized(640, 328)), "mlp", dtype, "cuda")
    launches.clear()
    for form in ("residual-gamma", "mlp"):
        compare(Case(133, 97, 129), form, dtype)
    assert not launches


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("widths", sized([(1024, 640), (1024, 1024)], [(96, 48), (96, 96)]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_added_in_place(widths: tuple[int, int], dtype: torch.dtype, backwards: int) -> None:
    """Of networks that share weights, in one backward or one after the other: as good as the sum of whole
    gradients."""
    width, head_dim = widths[0], sized(64, 16)
    torch.manual_seed(0)
    weights = ek.ElasticBlock(width, 3 * width, head_dim, layer_scale=0.5).to("cuda", dtype)
    inputs = [draw(74, w, seed=w).to("cuda", dtype) for w in widths]

    def gradients(name: str, kind: torch.dtype) -> list[Tensor | None]:
        block = copy.deepcopy(weights).to(kind)
        for number in range(backwards):
            with backend(name), ek.shared_gradients(accumulate=True):
                losses = [block(x.to(kind), [(2, 37)]).sin().sum() for x in inputs[number::backwards]]
            sum(losses).backward()
        return [p.grad for p in block.parameters()]

    truth = gradients("reference", torch.float64)
    assert_all_as_good(gradients("triton", dtype), gradients("reference", dtype), truth)


@pytest.mark.parametrize("gamma", [1e-5, 0.5])
def test_layer_scale_in_the_weights(gamma: float) -> None:
    """Of two networks that share them, under bf16 autocast."""
    width, narrow, head_dim = sized((1024, 640, 64), (96, 48, 16))
    torch.manual_seed(0)
    block = ek.ElasticBlock(width, 3 * width, head_dim, layer_scale=gamma).cuda()
    for bias in (block.attn.proj.bias, block.mlp.fc2.bias):
        torch.nn.init.normal_(bias)
    inputs = [draw(74, w, seed=w).float().cuda() for w in (width, narrow)]
    folded = ek.working_weights([], torch.bfloat16, block.scaled_layers())

    def results(name: str, block: ek.ElasticBlock) -> list[Tensor]:
        kind = block.norm1.weight.dtype
        exact = kind == torch.float64
        context = contextlib.nullcontext() if exact else torch.autocast("cuda", torch.bfloat16)
        with backend(name), ek.shared_gradients(), folded, context:
            branches = [block(x.to(kind), [(2, 37)]) - x.to(kind) for x in inputs]
        dys = [draw(*y.shape, seed=1).to(y) for y in branches]
        return [*branches, *torch.autograd.grad(branches, list(block.parameters()), dys)]

    truth = results("reference", copy.deepcopy(block).double())
    for ours, torchs, exact in zip(results("triton", block), results("reference", block), truth, strict=True):
        assert_as_good_as_torch(ours.bfloat16(), torchs.bfloat16(), exact)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("half", HALVES)
def test_a_stream_that_may_be_overwritten(half: str, affine: bool) -> None:
    assert_same_in_place(CASES["kept"], half, affine, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["linear-act", "residual-gamma", "mlp-half", "attention-half"])
def test_autocast_with_fp32_weights(form: str, dtype: torch.dtype) -> None:
    operator, exact = forms(CASES["narrowest"])[form]
    tensors = {key: t.float().cuda() for key, t in exact.items()}
    truth = run(operator, {key: t.double() for key, t in tensors.items()}, "reference")
    with torch.autocast("cuda", dtype):
        ours, torchs = (run(operator, tensors, name) for name in ("triton", "reference"))
    for key, value in ours.items():
        assert_as_good_as_torch(value.to(dtype), torchs[key], truth[key], label=key)


@gpu_only
def test_cuda_graph() -> None:
    """A captured block replays to the same bits: nothing in it waits for the host."""
    block = ek.ElasticBlock(256, 1024, 64, layer_scale=0.1).cuda().bfloat16()
    x, groups = draw(4 * 37, 128).to("cuda", torch.bfloat16), [(4, 37)]
    leaves = list(block.parameters())
    with backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compile before the capture
            expected = torch.autograd.grad(block(x, groups).float().sin().sum(), leaves)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(block(x, groups).float().sin().sum(), leaves)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    """Triton launches on the current device, if nobody changes it."""
    block = ek.ElasticBlock(256, 1024, 64, layer_scale=0.1).to("cuda:1", torch.bfloat16)
    x, groups = draw(4 * 37, 128).to("cuda:1", torch.bfloat16), [(4, 37)]
    results = []
    for current in (0, 1):
        with backend("triton"), torch.cuda.device(current):
            y = block(x, groups)
            results.append((y, *torch.autograd.grad(y.float().sin().sum(), list(block.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
