"""The GELU of low precision against erf in float64."""

from __future__ import annotations

from math import pi

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.activations import _normal_cdf, activate, activation_grad
from elastic_kernels.triton_ops.registration import on_its_device

EXACT = 2**-24
U = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-25.0, -0.0, 25.0])])


@triton.jit
def _values_kernel(u_ptr, out_ptr, size, BLOCK: tl.constexpr, IS_EXACT: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    u = tl.load(u_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, _normal_cdf(u, IS_EXACT), mask=mask)
    tl.store(out_ptr + size + offs, activate(u, "gelu", IS_EXACT), mask=mask)
    tl.store(out_ptr + 2 * size + offs, activation_grad(u, "gelu", IS_EXACT), mask=mask)


def actual(exact: bool) -> Tensor:
    """Phi, GELU and its gradient, `[3, values]`, by the kernels' functions."""
    return on_its_device(evaluated)(U, exact).double()


def evaluated(u: Tensor, exact: bool) -> Tensor:
    out = torch.full((3, len(u)), torch.nan)
    _values_kernel[(triton.cdiv(len(u), 512),)](u, out, len(u), BLOCK=512, IS_EXACT=exact)
    return out


def expected() -> Tensor:
    """The same in float64."""
    u = U.double()
    cdf = torch.special.ndtr(u)
    density = (-u * u / 2).exp() / (2 * pi) ** 0.5
    return torch.stack([cdf, u * cdf, cdf + (u * density).nan_to_num()])


def test_low_precision_is_within_the_rounding_of_bf16() -> None:
    (cdf, gelu, gradient), (true_cdf, true_gelu, true_gradient) = actual(exact=False), expected()
    assert (cdf - true_cdf).abs().max() < 1.2e-5
    tail = (U < 0) & (U >= -5)
    assert ((cdf - true_cdf) / true_cdf)[tail].abs().max() < 1.2e-3
    half_ulp = true_gelu.abs().log2().floor().exp2() * 2**-8
    near = U.abs() <= 5
    assert ((gelu - true_gelu).abs() <= half_ulp)[near & (U != 0)].all()
    assert (gelu - true_gelu)[~near].abs().max() < 1e-5
    assert (gradient - true_gradient).abs().max() < 1.3e-5
    assert gelu[-1] == U[-1] and gelu[-3].abs() < 1e-30


def test_fp32_keeps_erf() -> None:
    difference = (actual(exact=True) - expected())[:, :-3].abs()
    assert difference.max() < 12 * 4 * EXACT


@pytest.mark.parametrize("exact", [True, False])
def test_zero_is_kept(exact: bool) -> None:
    values = actual(exact)[:, -2]
    assert values.tolist() == pytest.approx([0.5, 0.0, 0.5], abs=1e-7)
