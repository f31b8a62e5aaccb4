"""The Triton linear layers and half-blocks under Triton's interpreter, against the definition in float64."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import elastic_kernels as ek
from elastic_kernels import backend
from elastic_kernels.shared_gradients import GradientLedger
from elastic_kernels.triton_ops import gemm, registration
from elastic_kernels.triton_ops.halves import BranchGradient
from helpers.kernels.linear_cases import (
    FREE_FORMS,
    HALVES,
    Case,
    assert_accurate,
    assert_same_in_place,
    assert_same_kept,
    forms,
    free_cases,
    linear,
    mlp_half,
    run,
)
from helpers.kernels.numerics import DTYPES, assert_as_good_as_torch, draw, opcheck

# By code path: one row, none, primes, both sides of the edges of fp32 tiles (64 x 32, steps of 32) and of
# half-precision ones (128 x 128, steps of 64), several splits of the wgrad, chosen rows.
CASES = {
    "one-row": Case(1, 16, 5),
    "no-rows": Case(0, 16, 16),
    "prime": Case(37, 48, 31),
    "edge-fp32": Case(65, 32, 33),
    "edge-half": Case(129, 64, 129),
    "odd-width": Case(7, 33, 65),
    "whole-weight": Case(37, 48, 31, spare=0),
    "kept": Case(31, 32, 48, kept=31),
    "none-kept": Case(0, 16, 16, kept=0),
    "free": Case(37, 24, 31, kept=37, spare=9, heads=3, hidden=29, scale=None),
}


@pytest.fixture(params=["cublas", "triton"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs the products that fuse nothing."""
    for form in gemm.PROVIDERS:
        monkeypatch.setitem(gemm.PROVIDERS, form, request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, case in CASES.items() for form in forms(case)]
)
def test_forward_and_gradients(name: str, form: str, dtype: torch.dtype) -> None:
    if form.endswith("only") and dtype == torch.bfloat16:
        pytest.skip("made of operators tested by themselves; here truncations of the interpreter add up")
    assert_accurate(CASES[name], form, dtype)


@pytest.mark.parametrize("form", FREE_FORMS)
def test_scale_hidden_units_and_heads(form: str) -> None:
    """Each value of each; every combination on a device."""
    for case in free_cases(form)[::4]:
        assert_accurate(case, form, torch.float16)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("form", ["linear-act", "mlp", "swiglu"])
def test_activations(form: str, activation: str) -> None:
    assert_accurate(Case(7, 33, 65, scale=0.5, activation=activation), form, torch.float16)


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("form", ["linear", "linear-bias", "qkv-bias", "attention-half"])
def test_both_providers(form: str) -> None:
    assert_accurate(CASES["edge-fp32"], form, torch.float32)


@pytest.mark.parametrize("tile", [{"block_n": 256}, {"block_n": 64, "beside": 64}], ids=str)
@pytest.mark.parametrize("form", ["linear-act", "residual-gamma", "mlp-half"])
def test_wide_tiles(form: str, tile: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose epilogues have several slices, of which 150 columns end in the middle of one."""
    config = gemm.GemmConfig(block_m=16, block_k=16, warps=4, stages=1, **tile)
    monkeypatch.setattr(gemm, "_FP32", config)
    assert_accurate(Case(17, 150, 150), form, torch.float32)


def test_strided_inputs_and_upstream_gradients() -> None:
    case = CASES["prime"]
    for form in ("linear-bias", "linear-act", "qkv-bias", "residual-gamma", "mlp-half", "attention-half"):
        operator, exact = forms(case)[form]
        plain = {key: t.float() for key, t in exact.items()}
        strided = {key: torch.stack([t, t], -1)[..., 0] if t.dim() == 2 else t for key, t in plain.items()}
        strided["x"] = torch.cat([plain["x"], plain["x"]], 1)[:, : case.width]
        ours = {name: run(operator, t, "triton") for name, t in (("plain", plain), ("strided", strided))}
        for key, value in ours["plain"].items():
            assert torch.equal(value, ours["strided"][key]), (form, key)
        leaf = plain["x"].clone().requires_grad_()
        y = operator(**(plain | {"x": leaf}))
        for dy in (
            torch.ones(()).expand(y.shape),
            draw(*y.shape[::-1]).float().permute(*range(y.dim())[::-1]),
        ):
            (strided_grad,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
            (plain_grad,) = torch.autograd.grad(y, leaf, dy.contiguous(), retain_graph=True)
            assert torch.equal(strided_grad, plain_grad), form


def test_leading_dimensions() -> None:
    weight = draw(8, 16).float()
    x = draw(2, 3, 16).float()
    assert torch.equal(ek.elastic_linear(x, weight).flatten(0, 1), ek.elastic_linear(x.flatten(0, 1), weight))


@pytest.mark.parametrize("form", ["linear-act", "residual-gamma", "mlp-half", "attention-half"])
def test_autocast_with_fp32_weights(form: str) -> None:
    """As in training: fp32 parameters and stream, products in half precision, fp32 weight gradients."""
    operator, exact = forms(CASES["prime"])[form]
    tensors = {key: t.float() for key, t in exact.items()}
    truth = run(operator, exact, "reference")
    low = run(operator, {key: t.half() for key, t in exact.items()}, "reference")
    with torch.autocast("cpu", torch.float16):
        ours = run(operator, tensors, "triton")
    for key, value in ours.items():
        if key != "output":
            assert value.dtype == torch.float32
        assert_as_good_as_torch(value.half(), low[key], truth[key], label=key)


def test_repeats_bitwise() -> None:
    for form in ("linear-bias", "mlp-half", "attention-half"):
        operator, exact = forms(CASES["prime"])[form]
        tensors = {key: t.half() for key, t in exact.items()}
        first, second = (run(operator, tensors, "triton") for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("form", ["mlp", "mlp-half", "head-mlps"])
def test_activations_that_are_kept(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and backward writes none."""
    again: list[bool] = []
    operator = registration.ops.linear_dgrad_act
    patched = lambda *arguments: again.append(arguments[-1]) or operator(*arguments)  # noqa: E731
    monkeypatch.setattr(registration.ops, "linear_dgrad_act", patched)
    assert_same_kept(CASES["prime"], form, torch.float16)
    half = len(again) // 2
    assert half and again == [True] * half + [False] * half


def test_two_widths_share_weights_when_recomputed() -> None:
    """Gradient checkpointing of two students of different widths adds up the right gradients."""
    torch.manual_seed(0)
    block = ek.ElasticBlock(32, 96, 16, layer_scale=0.5)
    groups, inputs = [(2, 5)], [draw(10, width).float() for width in (32, 16)]

    def gradients(name: str, recompute: bool) -> tuple[Tensor, ...]:
        with backend(name):
            outputs = [
                checkpoint(block, x, groups, use_reentrant=False) if recompute else block(x, groups)
                for x in inputs
            ]
            return torch.autograd.grad(sum(y.sin().sum() for y in outputs), list(block.parameters()))

    stored, recomputed = gradients("triton", False), gradients("triton", True)
    for ours, again, plain in zip(stored, recomputed, gradients("reference", False), strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_block_with_a_gate_and_a_rotary_embedding() -> None:
    """Of two widths that share gradients, under stochastic depth, and of some tokens alone."""
    rotary = ek.Rotary.of_grid(2, 2, head_dim=16, prefix=1, count=2)
    torch.manual_seed(0)
    block, only = ek.ElasticBlock(32, 40, 16, layer_scale=0.5, gate=True), torch.tensor([0, 7])
    rows = [torch.arange(start, start + 5) for start in (0, 5)]
    kept = [ek.KeptRows(((1, 5),), r, torch.full((5,), 1.5), ek.layouts.places_of(r, 10)) for r in rows]
    found = []
    for name in ("triton", "reference"):
        block.zero_grad()
        with backend(name), ek.shared_gradients(accumulate=True):
            streams = [draw(10, width).float() for width in (32, 16)]
            outputs = [block(x, [(2, 5)], (kept[0], kept[1]), only, rotary=rotary) for x in streams]
        sum(y.sin().sum() for y in outputs).backward()
        found.append([*outputs, *(p.grad for p in block.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("half", HALVES)
def test_a_stream_that_may_be_overwritten(half: str, affine: bool) -> None:
    assert_same_in_place(CASES["kept"], half, affine, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_may_become_the_stream(bias: bool) -> None:
    operator, exact = mlp_half(CASES["kept"])
    tensors = {key: t.float().nan_to_num() for key, t in exact.items()}
    width = tensors["x"].shape[1]
    weight, offset = draw(width, width).float().requires_grad_(), torch.ones(width) if bias else None
    results = []
    for inplace in (False, True):
        stream = ek.elastic_linear(tensors["x"], weight, offset)
        y = operator(**(tensors | {"x": stream}), inplace=inplace)
        results.append(torch.autograd.grad(y.sin().sum(), weight)[0])
    assert torch.equal(*results)


def test_overwriting_what_somebody_needs_is_an_error() -> None:
    operator, exact = mlp_half(CASES["kept"])
    tensors = {key: t.float().nan_to_num() for key, t in exact.items()}
    leaf = tensors.pop("x").requires_grad_()
    stream = leaf * 1.0
    square = stream * stream  # needs the stream in backward
    y = operator(x=stream, inplace=True, **tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + square.sum()).backward()


def test_registered_operators() -> None:
    x, weight, bias = draw(6, 16).float(), draw(2, 8, 16).float(), draw(2, 8).float()
    gamma, index, scale = draw(8).float(), torch.tensor([3, 0, 5]), torch.rand(3)
    ops, one = torch.ops.elastic_kernels, (weight[:1], bias[:1])
    u, d = draw(6, 16).float(), draw(6, 8).float()
    opcheck(
        (ops.linear_fwd, (x, *one, 1.5)),
        (ops.linear_fwd, (x, weight, None, 1.5)),
        (ops.linear_act_fwd, (x, *one, 1.5, "silu", True)),
        (ops.linear_act_fwd, (x, *one, 1.5, "gelu", False)),
        (ops.linear_residual_fwd, (x, *one, d, gamma, None, None, 1.5)),
        (ops.linear_residual_fwd, (x[:3], *one, d, None, index, scale, 1.5)),
        (ops.linear_residual_, (x[:3], *one, d.clone(), gamma, index, scale, 1.5)),
        (ops.linear_dgrad, (d, weight[:1], gamma, 1.5)),
        (ops.linear_dgrad, (draw(6, 2, 8).float(), weight, None, 1.5)),
        (ops.linear_dgrad_act, (d, weight[:1], gamma, u, 1.5, "gelu", True)),
        (ops.linear_dgrad_act, (d, weight[:1], None, u, 1.5, "silu", False)),
        (ops.linear_wgrad, (d, x, 1.5, torch.float32)),
        (ops.linear_wgrad, (draw(6, 2, 8).float(), x, 1.5, torch.float32)),
        (ops.linear_wgrad_, (weight.clone(), draw(6, 2, 8).float(), x, 1.5)),
        (ops.linear_bias_sums, (d,)),
        (ops.vector_grads_, ([draw(18).float()], [draw(3, 2, 8).float()], [draw(18).float()], [])),
        (
            ops.vector_grads_,
            (
                [weight[:1].clone(), draw(9).float()],
                [],
                [],
                [None, None, *one, gamma, u[None, :5], None, None],
            ),
        ),
        (ops.branch_grad, (d, index, scale, torch.float16, True)),
        (ops.branch_grad, (d, None, None, torch.float16, False)),
    )


def test_gradients_under_ddp(tmp_path: Path) -> None:
    """Hooks of DDP see ordinary full-shape gradients, of two widths added up."""
    torch.manual_seed(0)
    block, inputs = ek.ElasticBlock(32, 96, 16, layer_scale=0.5), [draw(10, w).float() for w in (32, 16)]

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self) -> Tensor:
            return sum(self.block(x, [(2, 5)]).sin().sum() for x in inputs)

    expected = torch.autograd.grad(Both()(), list(block.parameters()))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(Both())
        wrapped().backward()
        for parameter, gradient in zip(block.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    finally:
        dist.destroy_process_group()


class Calls(TorchDispatchMode):
    """Counts the operators of this package, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "elastic_kernels":
            self.counts[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("widths", "left", "added", "windows"),
    [
        ((48, 16), 6, 0, False),
        ((16, 48), 0, 0, False),
        ((48, 48), 6, 2, False),
        ((48, 16, 32), 6, 0, False),
        ((48, 16), 6, 0, True),
    ],
)
def test_gradients_are_added_in_place(widths: tuple[int, ...], left: int, added: int, windows: bool) -> None:
    """What autograd adds up; networks that came later leave their gradients of 4 weights and 2 norms, if as
    wide as the first for the products of the 2 without LayerScale to be added to."""
    torch.manual_seed(0)
    vit, swin = ek.ElasticBlock(48, 96, 16, layer_scale=0.5), ek.ElasticSwinBlock(48, 96, 16, 2, 1)
    block, groups = (swin, [(1, 2, 5)]) if windows else (vit, [(2, 5)])
    results, leave, leaves = [], GradientLedger.leave, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientLedger, "leave", lambda *args: (leaves.append(args[1]), leave(*args)))
        for context in (contextlib.nullcontext(), ek.shared_gradients()):
            with context:
                loss = sum(block(draw(10, w).float(), groups).sin().sum() for w in widths)
            with Calls() as calls:
                results.append(torch.autograd.grad(loss, list(block.parameters())))
    assert (len(leaves), calls.counts["linear_wgrad_"]) == (left, added)
    for ours, autograds in zip(*results, strict=True):
        torch.testing.assert_close(ours, autograds)


@pytest.mark.parametrize(("widths", "added"), [((48, 16), 1), ((16, 48), 2), ((48, 48, 16), 3)])
@pytest.mark.parametrize("windows", [False, True])
def test_gradients_are_added_to_those_of_earlier_backwards(
    widths: tuple[int, ...], added: int, windows: bool
) -> None:
    """As autograd adds them, with `added` products; two more a later network where there is no LayerScale."""
    torch.manual_seed(0)
    vit, swin = ek.ElasticBlock(48, 96, 16, layer_scale=0.5), ek.ElasticSwinBlock(48, 96, 16, 2, 1)
    block, groups = (swin, [(1, 2, 5)]) if windows else (vit, [(2, 5)])
    results = []
    for accumulate in (False, True):
        block.zero_grad()
        with Calls() as calls:
            for w in widths:
                with ek.shared_gradients(accumulate=accumulate):
                    loss = block(draw(10, w).float(), groups).sin().sum()
                loss.backward()
        results.append([p.grad.clone() for p in block.parameters()])
        expected = added + 2 * windows * (len(widths) - 1)
        assert calls.counts["linear_wgrad_"] == expected * accumulate
    for ours, autograds in zip(*results, strict=True):
        torch.testing.assert_close(ours, autograds)


@pytest.mark.parametrize("changed", ["", "by a sum", "by a hook"])
def test_branches_take_what_the_norm_after_them_left(changed: str) -> None:
    """Of two blocks under stochastic depth: the last half alone has a pass for its branch's gradient, and one
    whose gradient is no longer that which the norm made."""
    torch.manual_seed(0)
    blocks, x = [ek.ElasticBlock(32, 96, 16, layer_scale=0.5) for _ in range(2)], draw(15, 32).float()
    rows = [torch.tensor([*range(start, start + 5), *range(10, 15)]) for start in (0, 5)]
    kept = [ek.KeptRows(((2, 5),), r, torch.full((10,), 1.5), ek.layouts.places_of(r, 15)) for r in rows]
    found = []
    for before in (BranchGradient.before, lambda x: None):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.float16):
            patch.setattr(BranchGradient, "before", before)
            y = blocks[0](x.requires_grad_(), [(3, 5)], (kept[0], kept[1]))
            loss = blocks[1](y, [(3, 5)], (kept[1], kept[0])).sin().sum()
            loss = loss + y.cos().sum() if changed == "by a sum" else loss
            if changed == "by a hook":
                y.register_hook(lambda gradient: gradient.mul_(2))
        with Calls() as calls:
            found.append(torch.autograd.grad(loss, [x, *blocks[0].parameters(), *blocks[1].parameters()]))
        assert calls.counts["branch_grad"] == (4 if found[1:] else 1 + bool(changed))
    assert torch.equal(found[0][0], found[1][0])
    for left, taken in zip(*found, strict=True):
        torch.testing.assert_close(left, taken)


def test_a_bias_learns_beside_a_frozen_weight() -> None:
    case = CASES["prime"]
    operator, exact = linear(case, bias=True, activation=None)
    tensors = {key: t.float() for key, t in exact.items()}
    bias = tensors["bias"].requires_grad_()
    y = operator(**tensors)
    dy = draw(*y.shape, seed=20).float()
    (gradient,) = torch.autograd.grad(y, bias, dy)
    torch.testing.assert_close(gradient[: case.out], dy.sum(0))


@pytest.mark.parametrize("half", HALVES)
def test_short_vectors_are_refused_before_a_kernel_reads_beyond_them(half: str) -> None:
    operator, exact = forms(CASES["prime"])[half]
    tensors = {key: t.float() for key, t in exact.items()}
    for name in [key for key, t in tensors.items() if t.dim() == 1]:
        with pytest.raises(ValueError, match=rf"expected {name} \["):
            operator(**(tensors | {name: tensors[name][:-1]}))
