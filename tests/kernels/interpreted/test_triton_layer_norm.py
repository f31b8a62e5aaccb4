"""The Triton LayerNorm under Triton's interpreter, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import elastic_kernels.triton_ops.layer_norm  # noqa: F401, registers the operators
from elastic_kernels import elastic_layer_norm
from elastic_kernels.layouts import places_of
from helpers.kernels.layer_norm_cases import EPS, affine, assert_accurate, run
from helpers.kernels.numerics import DTYPES, draw, opcheck


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [None, 0.5, 0], ids=["all-rows", "some-rows", "no-kept-rows"])
@pytest.mark.parametrize("with_affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("tokens", "width"),
    [(1, 1), (7, 16), (33, 127), (33, 128), (8, 129), (5, 512), (5, 513), (0, 16)],
    ids=lambda n: str(n),
)
def test_forward_and_gradients(
    tokens: int, width: int, with_affine: bool, kept: float | None, dtype: torch.dtype
) -> None:
    rows = None if kept is None else int(kept * tokens)
    assert_accurate(tokens, width, 600, rows, with_affine, dtype)


def test_strided_rows_and_leading_dimensions() -> None:
    wide, dy = draw(6, 40).float(), draw(6, 16, seed=4).float()
    parameters = tuple(p.float() for p in affine(16, 20))
    for x in (wide[:, 8:24], wide.t().contiguous().t()[:, 8:24]):
        assert not x.is_contiguous()
        strided, plain = (run(t, parameters, None, dy, "triton") for t in (x, x.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))
    cube = elastic_layer_norm(wide[:, :16].reshape(2, 3, 16), *parameters, EPS)
    assert torch.equal(cube.view(6, 16), elastic_layer_norm(wide[:, :16], *parameters, EPS))


def test_expanded_and_transposed_upstream_gradients() -> None:
    x, parameters = draw(6, 16).float(), tuple(p.float() for p in affine(16, 20))
    for dy in (torch.ones(1, 1).expand(6, 16), draw(16, 6, seed=4).float().t()):
        for a, b in zip(*(run(x, parameters, None, dy, n) for n in ("triton", "reference")), strict=True):
            torch.testing.assert_close(a, b)


def test_mixed_dtypes_under_autocast() -> None:
    x, parameters = draw(6, 16).half(), tuple(p.float() for p in affine(16, 20))
    with torch.autocast("cpu", torch.bfloat16):
        y = elastic_layer_norm(x, *parameters, EPS)
    assert y.dtype == torch.float32


def test_repeats_bitwise() -> None:
    x, dy, parameters = draw(37, 16).half(), draw(37, 16, seed=4).half(), affine(16, 20)
    half = tuple(p.half() for p in parameters)
    first, second = (run(x, half, None, dy, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_registered_operators() -> None:
    x, (weight, bias) = draw(6, 16).float(), (p.float().nan_to_num() for p in affine(16, 20))
    forward, backward = torch.ops.elastic_kernels.layer_norm_fwd, torch.ops.elastic_kernels.layer_norm_bwd
    for index in (None, torch.tensor([4, 0])):
        places = None if index is None else places_of(index, 6)
        for w, b in ((weight, bias), (None, None)):
            arguments = (x, w, b, EPS, index, torch.float16)
            opcheck((forward, arguments), (forward, (*arguments, True)))
            y, xhat, mean, rstd = forward(*arguments, True)
            for mine, kept, centre, dsum in ((x, None, mean, None), (None, xhat, None, x)):
                opcheck((backward, (torch.ones_like(y), mine, kept, w, centre, rstd, places, dsum)))


def test_two_widths_share_an_affine_when_recomputed() -> None:
    weight, bias = (p.float().requires_grad_() for p in affine(32, 32))
    inputs = [draw(6, width).float() for width in (32, 16)]

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        outputs = [
            checkpoint(elastic_layer_norm, x, weight, bias, EPS, use_reentrant=False)
            if recompute
            else elastic_layer_norm(x, weight, bias, EPS)
            for x in inputs
        ]
        return torch.autograd.grad(sum(y.sin().sum() for y in outputs), (weight, bias))

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_too_wide_is_an_error_when_forced() -> None:
    with pytest.raises(RuntimeError, match="widths up to 4096, got 4097"):
        elastic_layer_norm(torch.zeros(1, 4097), None, None, EPS)
