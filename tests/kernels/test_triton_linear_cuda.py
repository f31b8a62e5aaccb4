"""The Triton linear layers and half-blocks on a GPU, at real sizes."""

from __future__ import annotations

import pytest
import torch
from linear_cases import Case, assert_zero_outside, forms, run
from numerics import DTYPES, assert_as_good_as_torch, draw

import elastic_kernels as ek
from elastic_kernels import backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CASES = {
    "narrowest": Case(4099, 384, 384, spare=640, head_dim=64),
    "intact": Case(2051, 1024, 1024, spare=0, head_dim=64),
    "kept": Case(3001, 640, 640, kept=3001, spare=384, head_dim=64),
    "odd": Case(257, 97, 129),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, case in CASES.items() for form in forms(case)]
)
def test_forward_and_gradients(name: str, form: str, dtype: torch.dtype) -> None:
    operator, exact = forms(CASES[name])[form]
    low = {key: t.to("cuda", dtype) for key, t in exact.items()}
    truth = run(operator, {key: t.double() for key, t in low.items()}, "reference")
    ours, again, torchs = (run(operator, low, which) for which in ("triton", "triton", "reference"))
    for key, value in ours.items():
        assert_as_good_as_torch(value, torchs[key], truth[key], label=key)
        assert torch.equal(value, again[key]), key
        if key != "output":
            assert_zero_outside(value, low[key[1:]])


@pytest.mark.parametrize("form", ["linear-gelu", "residual-gamma", "mlp-half", "attention-half"])
def test_autocast_with_fp32_weights(form: str) -> None:
    operator, exact = forms(CASES["narrowest"])[form]
    tensors = {key: t.float().cuda() for key, t in exact.items()}
    truth = run(operator, {key: t.double() for key, t in tensors.items()}, "reference")
    with torch.autocast("cuda", torch.bfloat16):
        ours, torchs = (run(operator, tensors, name) for name in ("triton", "reference"))
    for key, value in ours.items():
        assert_as_good_as_torch(value.bfloat16(), torchs[key], truth[key], label=key)


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
