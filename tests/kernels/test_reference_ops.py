"""The plain definitions of the elastic operators against written-out formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import elastic_kernels as ek
from helpers.kernels.numerics import poisoned

C, HIDDEN = 48, 192
WIDTHS = [16, 32, 48]


def tensor(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def assert_corner_gradient(full: Tensor, corner: tuple[int, ...]) -> None:
    """The gradient is non-zero inside the corner and exactly zero outside it."""
    assert full.grad is not None
    inside = tuple(slice(0, n) for n in corner)
    assert full.grad[inside].abs().min() > 0
    outside = full.grad.clone()
    outside[inside] = 0
    assert not outside.any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_elastic_linear(width: int, rows: int, activation: str | None, with_bias: bool) -> None:
    x, w, b = tensor(rows, width), tensor(40, width), tensor(40)
    weight = poisoned(w, 64, C)
    bias = poisoned(b, 64) if with_bias else None
    y = ek.elastic_linear(x, weight, bias, out_features=40, activation=activation)
    expected = (x * C / width) @ w.T + (b if with_bias else 0)
    torch.testing.assert_close(y, F.gelu(expected) if activation else expected)
    if rows:
        (y * tensor(rows, 40, seed=1)).sum().backward()
        assert_corner_gradient(weight, (40, width))
        if bias is not None:
            assert_corner_gradient(bias, (40,))


def test_elastic_linear_keeps_leading_dimensions_and_strides() -> None:
    weight = tensor(64, C)
    x = tensor(16, 3, 5).permute(2, 1, 0)
    y = ek.elastic_linear(x, weight)
    torch.testing.assert_close(y, (x.contiguous() * 3) @ weight[:, :16].T)
    y.sum().expand(2).sum()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_elastic_qkv(width: int, with_bias: bool) -> None:
    x, bias = tensor(5, width), tensor(3 * C) if with_bias else None
    corner = tensor(3, width, width)
    full = torch.full((3, C, C), math.nan, dtype=torch.float64)
    full[:, :width, :width] = corner
    weight = full.flatten(0, 1).requires_grad_()
    y = ek.elastic_qkv(x, weight, bias)
    expected = torch.stack([(x * C / width) @ w.T for w in corner], 1)
    if bias is not None:
        expected = expected + bias.view(3, C)[:, :width]
    torch.testing.assert_close(y, expected)
    (y * tensor(5, 3, width, seed=2)).sum().backward()
    grad = weight.grad.view(3, C, C)
    assert grad[:, :width, :width].abs().min() > 0
    grad[:, :width, :width] = 0
    assert not grad.any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gather", [False, True], ids=["all", "rows"])
def test_elastic_layer_norm(width: int, gather: bool) -> None:
    x, rows = tensor(6, width), torch.tensor([4, 0, 5])
    weight, bias = poisoned(tensor(width), C), poisoned(tensor(width, seed=1), C)
    y = ek.elastic_layer_norm(x, weight, bias, 1e-6, rows=rows if gather else None)
    kept = x[rows] if gather else x
    centred = kept - kept.mean(1, keepdim=True)
    normed = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y, normed * weight[:width] + bias[:width])
    (y * tensor(*y.shape, seed=3)).sum().backward()
    assert_corner_gradient(weight, (width,))
    assert_corner_gradient(bias, (width,))


@pytest.mark.parametrize("partial", [False, True], ids=["all-rows", "some-rows"])
def test_elastic_linear_residual(partial: bool) -> None:
    width, tokens = 32, 6
    rows = torch.tensor([5, 1, 2]) if partial else None
    scale = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64) if partial else None
    x, residual = tensor(3 if partial else tokens, width), tensor(tokens, width, seed=1)
    weight, bias = poisoned(tensor(width, width), C, C), poisoned(tensor(width), C)
    gamma = poisoned(tensor(width, seed=2), C)
    before = residual.clone()
    y = ek.elastic_linear_residual(x, weight, bias, residual, gamma, rows=rows, row_scale=scale)
    branch = (x * C / width) @ weight[:width, :width].T + bias[:width]
    branch = branch * gamma[:width]
    expected = residual.clone()
    for i, row in enumerate(rows.tolist() if partial else range(tokens)):
        expected[row] += branch[i] * (scale[i] if partial else 1)
    torch.testing.assert_close(y, expected)
    assert torch.equal(residual, before)
    (y * tensor(tokens, width, seed=4)).sum().backward()
    assert_corner_gradient(gamma, (width,))
    assert_corner_gradient(weight, (width, width))


@pytest.mark.parametrize("width", WIDTHS)
def test_elastic_mlp(width: int) -> None:
    hidden = ek.elastic_hidden_features(width, C, HIDDEN)
    fc1, fc2 = tensor(hidden, width), tensor(width, hidden)
    b1, b2 = tensor(hidden), tensor(width)
    x = tensor(5, width)
    y = ek.elastic_mlp(
        x, poisoned(fc1, HIDDEN, C), poisoned(b1, HIDDEN), poisoned(fc2, C, HIDDEN), poisoned(b2, C)
    )
    inner = F.gelu((x * C / width) @ fc1.T + b1)
    torch.testing.assert_close(y, (inner * HIDDEN / hidden) @ fc2.T + b2)


def test_hidden_features_truncate_like_the_official_code() -> None:
    assert ek.elastic_hidden_features(64, 784, 3136) == 255
    assert ek.elastic_hidden_features(640, 1024, 4096) == 2560


@pytest.mark.parametrize(
    "groups", [[(2, 5)], [(2, 5), (3, 2)], [(0, 5), (3, 2)], [(1, 1)], [(0, 5)], []], ids=str
)
def test_packed_attention(groups: list[tuple[int, int]]) -> None:
    heads, dim = 3, 8
    tokens = sum(count * length for count, length in groups)
    qkv = tensor(tokens, 3, heads, dim).requires_grad_()
    y = ek.packed_attention(qkv, groups)
    expected, start = torch.empty(tokens, heads * dim, dtype=torch.float64), 0
    for count, length in groups:
        for _ in range(count):
            q, k, v = qkv[start : start + length].unbind(1)
            weights = torch.einsum("ihd,jhd->hij", q, k).div(dim**0.5).softmax(-1)
            expected[start : start + length] = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
            start += length
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "masked"])
def test_packed_attention_by_offsets(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = tensor(9, 3, 2, 8).requires_grad_()
    expected = ek.packed_attention(qkv, [(1, 4), (2, 1), (1, 3)])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    actual = ek.packed_attention(qkv, torch.tensor([0, 4, 5, 5, 6, 9]))
    for a, b in zip(
        *([y, *torch.autograd.grad(y.sin().sum(), qkv)] for y in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)
    block = ek.ElasticBlock(16, 32, 8).double()
    x = tensor(9, 16)
    torch.testing.assert_close(block(x, torch.tensor([0, 5, 9])), block(x, [(1, 5), (1, 4)]))


def test_packed_attention_reads_strided_views() -> None:
    qkv = tensor(3, 10, 2, 8).transpose(0, 1)
    assert not qkv.is_contiguous()
    torch.testing.assert_close(
        ek.packed_attention(qkv, [(2, 5)]), ek.packed_attention(qkv.contiguous(), [(2, 5)])
    )


def test_autocast_with_fp32_weights() -> None:
    x, weight, bias = tensor(4, 16).float(), tensor(C, C).float(), tensor(C).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = ek.elastic_linear(x, weight, bias)
        residual = ek.elastic_linear_residual(y[:, :16], weight, bias, x)
    assert y.dtype == torch.bfloat16
    assert residual.dtype == torch.float32
    exact = ek.elastic_linear(x, weight, bias)
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ek.elastic_layer_norm(tensor(2, 49), tensor(C), tensor(C), 1e-6),
            "width in 1..48, got 49",
        ),
        (
            lambda: ek.elastic_linear_residual(tensor(2, 8), tensor(C, C), None, tensor(3, 8)),
            "3 rows of x, got 2",
        ),
        (lambda: ek.packed_attention(tensor(4, 2, 3, 8), [(2, 2)]), r"got \(4, 2, 3, 8\)"),
        (
            lambda: ek.packed_attention(tensor(4, 3, 3, 8), torch.tensor([0, 3])),
            r"rising from 0 to 4, got \[0, 3\]",
        ),
        (
            lambda: ek.packed_attention(tensor(4, 3, 3, 8), torch.tensor([0.0, 4.0])),
            r"int64 \[sequences \+ 1\] on cpu, got torch.float32 \[2\] on cpu",
        ),
        (lambda: ek.packed_attention(tensor(4, 3, 3, 8), [(2, 3)]), "cover 6 tokens, qkv has 4"),
    ],
)
def test_wrong_sizes(call: Any, words: str) -> None:
    """What else is refused is tried in `test_modules.py`."""
    with pytest.raises(ValueError, match=words):
        call()
