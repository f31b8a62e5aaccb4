"""The Triton group norm under Triton's interpreter, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels.triton_ops.group_norm  # noqa: F401, registers the operators
from elastic_kernels import elastic_group_norm
from helpers.kernels.group_norm_cases import EPS, FUSION_NAMES, FUSIONS, assert_accurate, run
from helpers.kernels.layer_norm_cases import affine
from helpers.kernels.numerics import draw, opcheck


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("activation", "added"), FUSIONS, ids=FUSION_NAMES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 3, 5, 8), 2),
        ((1, 40, 6), 2),
        ((2, 33, 96), 32),
        ((1, 7, 160), 32),
        ((2, 1, 130), 1),
        ((1, 9, 4), 4),
    ],
    ids=str,
)
def test_forward_and_gradients(
    shape: tuple[int, ...], groups: int, activation: str | None, added: bool, dtype: torch.dtype
) -> None:
    assert_accurate(shape, groups, dtype, activation, added)


def test_a_mean_far_from_zero() -> None:
    """Where the mean of squares minus the square of the mean would have no digits left."""
    assert_accurate((1, 70, 8), 2, torch.float32, None, added=False, offset=1e4)


def test_strides() -> None:
    wide = draw(2, 6, 20).float()
    parameters = tuple(p.float() for p in affine(8, 8))
    dy = draw(8, 6, 2, seed=4).float().permute(2, 1, 0)
    strided = run(wide[..., 4:12], parameters, 2, wide[..., 8:16], "relu", dy, "triton")
    plain = run(
        wide[..., 4:12].contiguous(),
        parameters,
        2,
        wide[..., 8:16].contiguous(),
        "relu",
        dy.contiguous(),
        "triton",
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_no_sample_and_results_repeat() -> None:
    parameters = tuple(p.float() for p in affine(8, 12))
    empty = run(torch.zeros(0, 4, 8), parameters, 2, None, "relu", torch.zeros(0, 4, 8), "triton")
    assert not any(gradient.any() for gradient in empty)
    x, dy = draw(3, 37, 8).float(), draw(3, 37, 8, seed=4).float()
    first, second = (run(x, parameters, 2, None, "relu", dy, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_number_that_is_none_stays_so() -> None:
    x = torch.ones(1, 4, 4)
    x[0, 0, 0] = torch.nan
    y = elastic_group_norm(x, torch.ones(4), torch.zeros(4), 2, EPS, activation="relu")
    assert y[..., :2].isnan().all()
    assert not y[..., 2:].isnan().any()


def test_registered_operators() -> None:
    x, weight, residual = draw(2, 5, 6).float(), draw(8).float(), draw(2, 5, 6, seed=1).float()
    ops = torch.ops.elastic_kernels
    arguments = (x, weight, weight, residual, 3, 1e-5, True)
    y, *statistics = ops.group_norm_fwd(*arguments)
    for keep in (True, False):
        opcheck((ops.group_norm_fwd, (*arguments, keep)))
        arguments_of_backward = (x, x, y, weight, *statistics, keep)
        opcheck((ops.group_norm_bwd, arguments_of_backward))
