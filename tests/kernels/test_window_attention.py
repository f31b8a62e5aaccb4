"""The plain definition of windowed attention against one written query by query."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic_kernels import relative_position_bias, window_attention
from elastic_kernels.window_attention import _chosen, _regions_differ
from helpers.kernels.numerics import draw

Maps = list[tuple[int, int, int]]
MAPS: list[Maps] = [[(2, 4, 4)], [(1, 5, 3), (2, 2, 2)], [(1, 1, 1)], [(2, 3, 7)]]


def inputs(maps: Maps, window: int, heads: int = 2, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, bias and pad with one head more than qkv has; what belongs to it is NaN."""
    tokens, n = sum(count * height * width for count, height, width in maps), window**2
    qkv, bias, pad = (
        draw(tokens, 3, heads, dim),
        draw(heads + 1, n, n, seed=1),
        draw(3, heads + 1, dim, seed=2),
    )
    bias[heads], pad[:, heads] = torch.nan, torch.nan
    return qkv, bias, pad


def one_map(qkv: Tensor, bias: Tensor, pad: Tensor, window: int, shift: int) -> Tensor:
    """`[height, width, 3, heads, dim]` -> `[height, width, heads, dim]`, one query at a time."""
    height, width, _, heads, dim = qkv.shape
    rows, columns = (-(-side // window) * window for side in (height, width))
    out = torch.zeros(height, width, heads, dim, dtype=qkv.dtype)

    def at(y: int, x: int) -> Tensor:
        y, x = (y + shift) % rows, (x + shift) % columns
        return qkv[y, x] if y < height and x < width else pad[:, :heads]

    def region(place: int, side: int) -> int:
        return (place >= side - window) + (place >= side - shift) if shift else 0

    for y in range(rows):
        for x in range(columns):
            source = (y + shift) % rows, (x + shift) % columns
            if source[0] >= height or source[1] >= width:
                continue
            top, left = y // window * window, x // window * window
            keys = [(top + r, left + c) for r in range(window) for c in range(window)]
            query = at(y, x)[0]
            place = (y - top) * window + x - left
            values = torch.stack([at(*key)[2] for key in keys])
            scores = torch.stack([(query * at(*key)[1]).sum(-1) for key in keys], -1) / math.sqrt(dim)
            scores = scores + bias[:heads, place]
            own_region = region(y, rows), region(x, columns)
            masked = torch.tensor([(region(a, rows), region(b, columns)) != own_region for a, b in keys])
            p = (scores - 100.0 * masked).softmax(-1)
            out[source] = torch.einsum("hk,khd->hd", p, values)
    return out


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("maps", MAPS, ids=str)
def test_windows_shift_padding_and_regions(maps: Maps, window: int, shift: int) -> None:
    if shift >= window:
        return
    qkv, bias, pad = inputs(maps, window)
    got = window_attention(qkv, bias, pad, maps, window=window, shift=shift)
    expected, start = [], 0
    for count, height, width in maps:
        for _ in range(count):
            part = qkv[start : start + height * width].unflatten(0, (height, width))
            expected.append(one_map(part, bias, pad, window, shift).flatten(2).flatten(0, 1))
            start += height * width
    torch.testing.assert_close(got, torch.cat(expected))


def test_gradients() -> None:
    maps: Maps = [(1, 3, 4), (2, 2, 2)]
    leaves = [torch.nan_to_num(t).requires_grad_() for t in inputs(maps, 3)]
    torch.autograd.gradcheck(lambda q, b, p: window_attention(q, b, p, maps, window=3, shift=1), leaves)


@pytest.mark.parametrize("window", [2, 3, 7])
def test_bias_of_offsets(window: int) -> None:
    side = 2 * window - 1
    table = draw(side**2, 2)
    bias = relative_position_bias(table, window)
    for query in range(window**2):
        for key in range(window**2):
            dy, dx = query // window - key // window, query % window - key % window
            offset = (dy + window - 1) * side + dx + window - 1
            assert torch.equal(bias[:, query, key], table[offset])


def test_wrong_input() -> None:
    qkv, bias, pad = inputs([(1, 2, 2)], 2)
    for match, arguments, options in [
        ("expected qkv", (qkv[:, 0], bias, pad, [(1, 2, 2)]), {}),
        ("expected bias", (qkv, bias[:, :3], pad, [(1, 2, 2)]), {}),
        ("expected pad", (qkv, bias, pad[:2], [(1, 2, 2)]), {}),
        ("cover 6 tokens, qkv has 4", (qkv, bias, pad, [(1, 2, 3)]), {}),
        ("expected a shift in 0..1, got 2", (qkv, bias, pad, [(1, 2, 2)]), {"shift": 2}),
    ]:
        with pytest.raises(ValueError, match=match):
            window_attention(*arguments, window=2, **options)


def test_planning_leaves_no_constants_behind() -> None:
    """Under `FakeTensorMode` constants have no values; later calls get real ones."""
    _regions_differ.cache_clear()
    _chosen.cache_clear()
    qkv, bias, pad = inputs([(1, 5, 3)], 3)
    table = draw(25, 3)
    with FakeTensorMode():
        planned = window_attention(
            torch.empty(qkv.shape),
            torch.empty(bias.shape),
            torch.empty(pad.shape),
            [(1, 5, 3)],
            window=3,
            shift=1,
        )
        relative_position_bias(torch.empty(table.shape), 3)
    actual = window_attention(qkv, bias, pad, [(1, 5, 3)], window=3, shift=1)
    assert actual.shape == planned.shape and actual.isfinite().all()
    assert relative_position_bias(table, 3).isfinite().all()
