"""Blocks of every kind of elastic network against the formula on slices, in float64: scale, hidden, heads."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels.linear import Scale
from helpers.kernels.numerics import draw

WIDTH, HIDDEN, DIM, HEADS = 12, 20, 4, 5  # heads together are wider than the network
GROUPS = [(2, 3), (1, 2)]


def sliced(layer: torch.nn.Linear, out: Tensor, width: int, scale: Scale) -> dict[str, Tensor]:
    """Rows `out` and the first columns, times the scale."""
    s = layer.in_features / width if scale == "offset" else 1.0 if scale is None else scale
    return {"weight": layer.weight[out, :width] * s, "bias": layer.bias[out]}


def formula(block: ek.ElasticBlock, x: Tensor, hidden: int, heads: int, scale: Scale) -> Tensor:
    """What naive slicing computes."""
    width, inner = x.shape[1], heads * DIM
    stack = torch.arange(3 * HEADS * DIM).view(3, -1)[:, :inner].flatten()
    every = torch.arange(width)
    norms = [(x.shape[1:], norm.weight[:width], norm.bias[:width]) for norm in (block.norm1, block.norm2)]
    h = F.linear(F.layer_norm(x, *norms[0], 1e-6), **sliced(block.attn.qkv, stack, width, scale))
    parts = []
    for count, length in GROUPS:
        for _ in range(count):
            done = sum(len(part) for part in parts)
            q, k, v = h[done : done + length].view(length, 3, heads, DIM).permute(1, 2, 0, 3)
            parts.append(((q @ k.mT * DIM**-0.5).softmax(-1) @ v).transpose(0, 1).flatten(1))
    x = x + F.linear(torch.cat(parts), **sliced(block.attn.proj, every, inner, scale))
    first = block.mlp.fc1
    units = torch.arange(first.out_features).view(-1, HIDDEN)[:, :hidden].flatten()
    h = F.linear(F.layer_norm(x, *norms[1], 1e-6), **sliced(first, units, width, scale)).split(hidden, 1)
    h = F.gelu(h[0]) if len(h) == 1 else F.silu(h[0]) * h[1]
    return x + F.linear(h, **sliced(block.mlp.fc2, every, hidden, scale))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("scale", "width", "hidden", "heads"),
    [*product(("offset", None, 0.7), (5, WIDTH), (7, HIDDEN), (2, HEADS))],
)
def test_block(scale: Scale, width: int, hidden: int, heads: int, gate: bool) -> None:
    torch.manual_seed(0)
    block = ek.ElasticBlock(WIDTH, HIDDEN, DIM, heads=HEADS, scale=scale, gate=gate).double()
    x, sizes = draw(8, width), {"hidden": hidden, "heads": heads}
    results = []
    static = ek.ElasticBlock(width, hidden, DIM, heads=heads, scale=None, gate=gate).double()
    static.load_state_dict(block.static_state(width, **sizes))
    for y in (block(x, GROUPS, **sizes), formula(block, x, hidden, heads, scale)):
        results.append(
            [y, *torch.autograd.grad((y * draw(8, width, seed=1)).sum(), list(block.parameters()))]
        )
    torch.testing.assert_close(*results)
    torch.testing.assert_close(static(x, GROUPS), results[0][0])


def test_sizes_follow_the_width_by_default() -> None:
    block = ek.ElasticBlock(WIDTH, HIDDEN, DIM, heads=6).double()
    x = draw(8, 6)
    assert torch.equal(block(x, GROUPS), block(x, GROUPS, hidden=10, heads=3))


@pytest.mark.parametrize("scale", ["offset", None, 0.7])
def test_scale_of_the_other_modules(scale: Scale) -> None:
    s = 3.0 if scale == "offset" else scale or 1.0
    linear = ek.ElasticLinear(12, 3, scale=scale).double()
    x = draw(2, 4)
    torch.testing.assert_close(linear(x), s * x @ linear.weight[:, :4].T + linear.bias)
    (first,) = ek.elastic_head_mlps(x, [[(linear.weight, linear.bias), (draw(2, 3), None)]], scale=scale)
    torch.testing.assert_close(
        first, (1.0 if scale is None or scale == "offset" else scale) * F.gelu(linear(x)) @ draw(2, 3).T
    )
    swin = ek.ElasticSwinBlock(12, 24, 4, 2, 1, heads=5, scale=scale).double()
    torch.nn.init.normal_(swin.attn.relative_position_bias_table)
    sizes = {"hidden": 7, "heads": 2}
    small = ek.ElasticSwinBlock(5, 7, 4, 2, 1, heads=2, scale=None).double()
    small.load_state_dict(swin.static_state(5, **sizes))
    torch.testing.assert_close(small(draw(9, 5), [(1, 3, 3)]), swin(draw(9, 5), [(1, 3, 3)], **sizes))
    resnet = ek.ElasticBottleneck(6, 12, 6, 2, scale=scale).double()
    small = ek.ElasticBottleneck(6, 4, 6, 2, scale=None).double()
    small.load_state_dict(resnet.static_state(4))
    torch.testing.assert_close(small(draw(1, 3, 3, 6), 4), resnet(draw(1, 3, 3, 6), 4))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 21, "heads": 5}, r"hidden in 1..20, got 21"),
        ({"heads": 6}, r"heads in 1..5, got 6"),
        ({}, "expected heads, or a width whose part of 20 channels is a multiple of head_dim 4, got 5"),
    ],
)
def test_wrong_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ek.ElasticBlock(WIDTH, HIDDEN, DIM, heads=HEADS)(torch.zeros(8, 5), GROUPS, **sizes)


def test_wrong_scale() -> None:
    with pytest.raises(ValueError, match="scale: expected 'offset', None or a number, got 'none'"):
        ek.elastic_linear(torch.zeros(1, 2), torch.zeros(2, 2), scale="none")  # type: ignore[arg-type]
