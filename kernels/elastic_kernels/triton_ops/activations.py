"""Activations of the MLP kernels and their derivatives: the GELU, exact or with tanh, and SiLU.

    act(u) = u g(u)        g: Phi, or the sigmoid of u, or of 2 sqrt(2 / pi) (u + 0.044715 u^3)

The exact GELU is that of erf in fp32; in half precision see `_normal_cdf`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
LOG2_E = tl.constexpr(1.4426950408889634)
TANH_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)

# In a pass of its own, where no product follows that it could be fused into.
ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}


@triton.jit
def _normal_cdf(u, EXACT: tl.constexpr):
    """Phi(u): by erf, or as the sigmoid of u p(u^2): 7,410 instead of 12,690 instructions of fc1 on sm_90.

    p is the polynomial of degree 5 nearest to log(Phi / (1 - Phi)) / u in |u| <= 5, beyond which it stays
    constant. Largest error of Phi: 1.1e-5, and for -5 <= u < 0 1.1e-3 of it: half of bf16's
    rounding, but up to four times that of fp16, where the GELU is small.
    """
    if EXACT:
        return 0.5 * (1 + tl.math.erf(u * SQRT_HALF))
    t = tl.minimum(u * u, 25.0)
    p = 2.2992446104517775e-06 + t * -3.3033019815615554e-08
    p = -4.866539233645919e-05 + t * p
    p = -0.00036313149531971123 + t * p
    p = 0.07316033069140324 + t * p
    p = 1.5955882425012544 + t * p
    return 1 / (1 + tl.exp2(u * p * -LOG2_E))


@triton.jit
def activate(u, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "silu":
        g = tl.sigmoid(u)
    elif ACTIVATION == "gelu_tanh":
        g = tl.sigmoid(u * (TANH_SLOPE + TANH_SLOPE * 0.044715 * u * u))
    else:
        g = _normal_cdf(u, EXACT)
    return u * g


@triton.jit
def activation_grad(u, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "silu":
        g = tl.sigmoid(u)
        slope = g * (1 - g)
    elif ACTIVATION == "gelu_tanh":
        g = tl.sigmoid(u * (TANH_SLOPE + TANH_SLOPE * 0.044715 * u * u))
        slope = g * (1 - g) * (TANH_SLOPE + 3 * TANH_SLOPE * 0.044715 * u * u)
    else:
        g = _normal_cdf(u, EXACT)
        slope = tl.exp2(u * u * (-0.5 * LOG2_E)) * INV_SQRT_2PI
    return g + u * slope
