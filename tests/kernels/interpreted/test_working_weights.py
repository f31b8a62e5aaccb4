"""Low-precision copies of weights under Triton's interpreter, against rounding for every product."""

from __future__ import annotations

import pytest
import torch
from numerics import draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import elastic_kernels as ek


def parts() -> tuple[ek.ElasticBlock, list[Tensor]]:
    torch.manual_seed(0)
    block = ek.ElasticBlock(32, 96, 16, layer_scale=0.5)
    return block, [block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]


def forward(block: ek.ElasticBlock, width: int = 32) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return block(draw(10, width).float(), [(2, 5)])


@pytest.mark.parametrize(("width", "tolerance"), [(32, 0.0), (16, 2e-3)], ids=["whole", "corner"])
def test_same_results(width: int, tolerance: float) -> None:
    """To the bit; of a corner, which the CPU's library sums in another order, up to rounding."""
    found = []
    for copied in (False, True):
        block, weights = parts()
        copies = ek.working_weights(weights, torch.float16) if copied else {}
        y = forward(block, width)
        found.append([y, *torch.autograd.grad(y.sin().sum(), list(block.parameters()))])
        assert all(copy.dtype == torch.float16 for copy in copies.values())
    assert found[1][1].dtype == torch.float32
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_no_weight_is_rounded() -> None:
    class Roundings(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            rounds = function is torch.ops.aten._to_copy.default and args[0].dim() >= 2
            self.count += rounds and args[0].shape[-2] >= 32
            return function(*args, **(kwargs or {}))

    counts = []
    for copied in (False, True):
        block, weights = parts()
        copies = ek.working_weights(weights, torch.float16) if copied else {}
        with Roundings() as roundings:
            forward(block)
        counts.append(roundings.count)
        del copies
    assert counts == [4, 0]


def test_a_weight_that_moved_on_is_rounded_again() -> None:
    block, weights = parts()
    ek.working_weights(weights, torch.float16)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5)
    plain, _ = parts()
    plain.load_state_dict(block.state_dict())
    assert torch.equal(forward(block), forward(plain))


def test_the_optimizer_writes_them() -> None:
    """Two steps with copies are two steps without."""
    found = []
    for copied in (False, True):
        block, weights = parts()
        copies = ek.working_weights(weights, torch.float16) if copied else {}
        optimizer = ek.FusedAdamW(block.parameters(), lr=0.1, copies=copies)
        for _ in range(2):
            optimizer.zero_grad()
            forward(block).sin().sum().backward()
            optimizer.step()
        found.append([forward(block), *block.parameters()])
        for weight, copy in copies.items():
            assert torch.equal(weight.half(), copy)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_wrong_dtype() -> None:
    with pytest.raises(TypeError, match="expected float16 or bfloat16, got torch.float32"):
        ek.working_weights([torch.zeros(2, 2)], torch.float32)
