"""The plain definition of elastic group norm, its fusions and its refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elastic_kernels import elastic_group_norm
from helpers.kernels.numerics import draw


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("channels", [4, 6, 8])
def test_it_is_the_group_norm_of_a_prefix(channels: int, added: bool, activation: str | None) -> None:
    x, weight, bias = draw(2, 3, 5, channels), draw(8, seed=1), draw(8, seed=2)
    weight[channels:], bias[channels:] = torch.nan, torch.nan
    residual = draw(2, 3, 5, channels, seed=3) if added else None
    got = elastic_group_norm(x, weight, bias, 2, 1e-3, residual=residual, activation=activation)
    expected = F.group_norm(x.permute(0, 3, 1, 2), 2, weight[:channels], bias[:channels], 1e-3)
    expected = expected.permute(0, 2, 3, 1) + (0 if residual is None else residual)
    torch.testing.assert_close(got, expected.relu() if activation else expected)


def test_a_scaled_input_is_a_smaller_eps() -> None:
    """How a bottleneck takes the offset scale of its 3x3 convolution without a pass over its output."""
    x, weight, bias = draw(2, 9, 4), draw(4, seed=1), draw(4, seed=2)
    scaled = elastic_group_norm(3 * x, weight, bias, 2, 1e-2)
    torch.testing.assert_close(elastic_group_norm(x, weight, bias, 2, 1e-2 / 9), scaled)


@pytest.mark.parametrize("apart", [0, 1000], ids=["one-mean", "a-mean-for-each-group"])
def test_large_means_cost_no_digits(apart: float) -> None:
    """But those of the mean itself; sums of squares would lose three more."""
    x, weight, bias = 300 + draw(4, 8, 8, 16) + apart * (torch.arange(16) // 4), draw(16), draw(16)
    exact = elastic_group_norm(x.float().double(), weight, bias, 4, 1e-5)
    got = elastic_group_norm(x.float(), weight.float(), bias.float(), 4, 1e-5)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-6 * (300 + 3 * apart))


def test_half_precision_is_computed_in_single() -> None:
    x, weight, bias = draw(2, 9, 4).bfloat16(), draw(4, seed=1).float(), draw(4, seed=2).float()
    got = elastic_group_norm(x, weight, bias, 2, 1e-5)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, elastic_group_norm(x.float(), weight, bias, 2, 1e-5).bfloat16())


def test_gradients() -> None:
    leaves = [
        t.requires_grad_() for t in (draw(2, 3, 4), draw(6, seed=1), draw(6, seed=2), draw(2, 3, 4, seed=3))
    ]
    torch.autograd.gradcheck(
        lambda x, w, b, r: elastic_group_norm(x, w, b, 2, 1e-3, residual=r, activation="relu"), leaves
    )


def test_wrong_input() -> None:
    x, weight, bias = draw(2, 9, 4), draw(4, seed=1), draw(4, seed=2)
    for match, arguments, options in [
        ("channels", (draw(2, 9, 5), weight, bias, 5), {}),
        ("a multiple of 3", (x, weight, bias, 3), {}),
        ("expected residual", (x, weight, bias, 2), {"residual": x.float()}),
        ("expected activation None or 'relu', got 'gelu'", (x, weight, bias, 2), {"activation": "gelu"}),
    ]:
        with pytest.raises(ValueError, match=match):
            elastic_group_norm(*arguments, 1e-5, **options)
