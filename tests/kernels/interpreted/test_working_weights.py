"""Weights rounded once for many products under Triton's interpreter, against rounding for every product."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import elastic_kernels as ek
from elastic_kernels.triton_ops import folding
from helpers.kernels.numerics import draw, opcheck


def parts() -> tuple[ek.ElasticBlock, list[Tensor]]:
    torch.manual_seed(0)
    block = ek.ElasticBlock(32, 96, 16, layer_scale=0.5)
    return block, [block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]


def rounded(weights: list[Tensor], once: bool) -> AbstractContextManager[object]:
    return ek.working_weights(weights, torch.float16) if once else nullcontext()


def folded(block: ek.ElasticBlock) -> ek.working_weights:
    """LayerScale in the weights of the layers before it, which are not rounded otherwise."""
    return ek.working_weights(
        [block.attn.qkv.weight, block.mlp.fc1.weight], torch.float16, block.scaled_layers()
    )


def forward(block: ek.ElasticBlock, width: int = 32) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return block(draw(10, width).float(), [(2, 5)])


@pytest.mark.parametrize(("width", "tolerance"), [(32, 0.0), (16, 2e-3)], ids=["whole", "corner"])
def test_same_results(width: int, tolerance: float) -> None:
    """To the bit; of a corner, which the CPU's library sums in another order, up to rounding."""
    results = []
    for once in (False, True):
        block, weights = parts()
        with rounded(weights, once):
            y = forward(block, width)
            results.append([y, *torch.autograd.grad(y.sin().sum(), list(block.parameters()))])
    assert results[1][1].dtype == torch.float32
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_no_product_rounds_its_weight() -> None:
    class Roundings(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            rounds = function is torch.ops.aten._to_copy.default and args[0].dim() >= 2
            self.count += rounds and args[0].shape[-2] >= 32
            return function(*args, **(kwargs or {}))

    counts = []
    for once in (False, True):
        block, weights = parts()
        with rounded(weights, once), Roundings() as roundings:
            forward(block)
        counts.append(roundings.count)
    assert counts == [4, 0]


def test_what_the_optimiser_wrote_is_not_rounded_again() -> None:
    """But with data of another place, though they come back to the first one, and of another shape."""
    weight = nn.Parameter(torch.randn(48, 32))
    weight.grad = torch.ones_like(weight)
    copies = ek.working_weights([weight], torch.float16)
    optimizer = ek.FusedAdamW([weight], lr=0.1)
    (place,) = copies.places().values()
    with optimizer.writing(copies):
        optimizer.step()
        assert torch.equal(place, weight.half())
        place.zero_()
        with copies:
            assert not place.any()
        for other in (weight.detach().clone(), weight.detach().view(32, 48).t()):
            first, weight.data = weight.data, other
            with copies:
                assert torch.equal(place, weight.half())
            weight.data = first
            place.zero_()
    with copies:
        assert torch.equal(place, weight.half())


def swapped(weight: nn.Parameter) -> None:
    nn.utils.vector_to_parameters(torch.zeros(weight.numel()), [weight])


def stepped(weight: nn.Parameter, **how: bool) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0, **how).step()


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "AdamW": stepped,
    "fused AdamW": lambda weight: stepped(weight, fused=True),
    "ours": lambda weight: ek.FusedAdamW([weight], lr=1.0).step(stepped(weight)),
    "data": lambda weight: weight.data.mul_(0),
    "other data": lambda weight: setattr(weight, "data", torch.zeros_like(weight)),
    "vector_to_parameters": swapped,
    "load_state_dict": lambda weight: nn.ParameterList([weight]).load_state_dict({"0": weight.detach() * 2}),
}


@pytest.mark.parametrize("case", ["left", "entered", "written"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_product_uses_an_old_weight(change: str, case: str) -> None:
    """However it was changed, after the context was left, or it is entered again, or one wrote copies."""
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(48, 32)), torch.randn(4, 32)

    def product() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            return ek.elastic_linear(x, weight, None)

    copies = ek.working_weights([weight], torch.float16)
    with ExitStack() as writing:
        if case == "written":
            writing.enter_context((optimizer := ek.FusedAdamW([weight], lr=0.1)).writing(copies))
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        with copies:
            before = product()
        if change == "data":  # which nothing shows
            writing.close()
        CHANGES[change](weight)
        with nullcontext() if case == "left" else copies:
            after = product()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, x.half() @ weight.detach().half().t(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("width", [32, 16])
def test_layer_scale_in_the_weights(width: int) -> None:
    """Results and gradients are those without, up to rounding, and follow LayerScale when it changes."""
    block, _ = parts()
    torch.nn.init.normal_(block.attn.proj.bias)
    copies = folded(block)
    for largest in (0.5, 1.5):
        results = []
        for scale in (block.ls1, block.ls2):
            torch.nn.init.uniform_(scale.gamma, 0.3, largest)
        for context in (nullcontext(), copies):
            with context:
                y = forward(block, width)
            results.append([y, *torch.autograd.grad(y.sin().sum(), list(block.parameters()))])
        assert not torch.equal(results[0][0], results[1][0])
        for plain, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_backward_that_comes_too_late_is_refused(scaled: bool) -> None:
    block, weights = parts()
    copies = folded(block) if scaled else ek.working_weights(weights, torch.float16)
    if scaled:  # of which the last one alone needs what was folded
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name.startswith("mlp.fc1"))
    with copies:
        y = forward(block)
    with copies, pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_contexts_may_be_nested() -> None:
    """The inner one adds to the outer; the same object may be entered twice."""
    block, weights = parts()
    expected = forward(block)
    outer, inner = ek.working_weights(weights[:2], torch.float16), ek.working_weights(weights, torch.float16)
    with outer, inner, outer:
        assert torch.equal(forward(block), expected)
    assert torch.equal(forward(block), expected)


def test_wrong_dtype() -> None:
    with pytest.raises(TypeError, match="expected float16 or bfloat16, got torch.float32"):
        ek.working_weights([torch.zeros(2, 2)], torch.float32)


def test_registered_operator() -> None:
    weight, gamma, result = draw(5, 8).float(), draw(5).float(), draw(5, 8).half()
    table = folding.table_of([weight], folding.addresses_of([weight], [gamma], [result]))
    arguments = ([result], table.tensors, table.tiles, table.aligned)
    opcheck((torch.ops.elastic_kernels.fold_layer_scale, arguments))
