"""Elastic transformer MLP: two elastic linears around a GELU.

    y = fc2(gelu(fc1(x)))          hidden: given, or int(w / w_max * hidden_max)

Source: POA (Zhang et al., ECCV 2024), section 3.2; official `DynamicMlp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from elastic_kernels import validate
from elastic_kernels.linear import Scale, elastic_linear, layer_spec, linear_backend

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.layers import LayerSpec


def elastic_hidden_features(width: int, max_width: int, max_hidden: int) -> int:
    """Count the hidden units of a subnet's MLP, `int(width / max_width * max_hidden)` in floating point.

    The truncation is the official one; it loses a unit for a few odd maxima (784 wide, subnet 64: 255).

    Example:
        >>> from elastic_kernels import elastic_hidden_features
        >>> elastic_hidden_features(256, 384, 1536)
        1024
    """
    return int(width / max_width * max_hidden)


def elastic_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    hidden: int | None = None,
    scale: Scale = "offset",
) -> Tensor:
    """Apply both linears and the GELU: `fc2(gelu(fc1(x)))`, each `fc` an `elastic_linear`.

    Args:
        x: `[..., w]`.
        fc1_weight, fc1_bias: `[hidden_max, w_max]`, `[hidden_max]`.
        fc2_weight, fc2_bias: `[w_max, hidden_max]`, `[w_max]`.
        hidden: units in use; default `elastic_hidden_features`, the share that `w` has of `w_max`.
        scale: of both layers, as in `elastic_linear`.

    Returns:
        `[..., w]`, the dtype of the matrix product.

    Raises:
        ValueError, TypeError, RuntimeError: as `elastic_linear`.

    Numerics: as of `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_mlp
        >>> fc1, fc2 = torch.randn(256, 64), torch.randn(64, 256)
        >>> elastic_mlp(torch.randn(5, 32), fc1, torch.zeros(256), fc2, torch.zeros(64)).shape
        torch.Size([5, 32])
    """
    width = x.shape[-1]
    validate.prefix("elastic_mlp", "width", width, fc1_weight.shape[1])
    validate.operands("elastic_mlp", x=x, fc1_weight=fc1_weight, fc2_weight=fc2_weight)
    validate.mlp("elastic_mlp", x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    hidden = active_hidden("elastic_mlp", hidden, fc1_weight, width)
    if linear_backend("elastic_mlp", x).backend == "triton":
        from elastic_kernels.triton_ops.layers import MlpFunction

        specs = mlp_specs(x, fc1_weight, fc2_weight, hidden, scale)
        parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return MlpFunction.apply(x.reshape(-1, width), *parameters, specs).view(x.shape)
    inner = elastic_linear(x, fc1_weight, fc1_bias, out_features=hidden, scale=scale, activation="gelu")
    return elastic_linear(inner, fc2_weight, fc2_bias, out_features=width, scale=scale)


def active_hidden(op: str, hidden: int | None, fc1_weight: Tensor, width: int) -> int:
    """Hidden units in use: those given, or the share that a width has.

    Raises ValueError if there are not so many.
    """
    most, largest = fc1_weight.shape
    if hidden is None:
        return elastic_hidden_features(width, largest, most)
    validate.prefix(op, "hidden", hidden, most)
    return hidden


def mlp_specs(
    x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, hidden: int, scale: Scale
) -> tuple[LayerSpec, LayerSpec]:
    """How the Triton kernels use both weights of an MLP for an input."""
    second = layer_spec(x, fc2_weight, x.shape[-1], width=hidden, scale=scale)
    return layer_spec(x, fc1_weight, hidden, scale=scale), second
