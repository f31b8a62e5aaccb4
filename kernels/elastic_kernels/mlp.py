"""Elastic transformer MLP: two elastic linears around an activation, or a gate.

    y = fc2(gelu(fc1(x)))          hidden: given, or int(w / w_max * hidden_max)

Source: POA (Zhang et al., ECCV 2024), section 3.2; official `DynamicMlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from elastic_kernels import validate
from elastic_kernels.linear import (
    ACTIVATIONS,
    Scale,
    elastic_linear,
    layer_spec,
    linear_backend,
    stacked_linear,
)

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
    activation: str = "gelu",
) -> Tensor:
    """Apply both linears and the activation: `fc2(act(fc1(x)))`, each `fc` an `elastic_linear`.

    Args:
        x: `[..., w]`.
        fc1_weight, fc1_bias: `[hidden_max, w_max]`, `[hidden_max]`.
        fc2_weight, fc2_bias: `[w_max, hidden_max]`, `[w_max]`.
        hidden: units in use; default `elastic_hidden_features`, the share that `w` has of `w_max`.
        scale: of both layers, as in `elastic_linear`.
        activation: as in `elastic_linear`.

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
    validate.one_of("elastic_mlp", "activation", activation, ACTIVATIONS)
    if linear_backend("elastic_mlp", x).backend == "triton":
        from elastic_kernels.triton_ops.layers import MlpFunction

        specs = mlp_specs(x, fc1_weight, fc2_weight, hidden, scale)
        parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return MlpFunction.apply(x.reshape(-1, width), *parameters, specs, activation).view(x.shape)
    inner = elastic_linear(x, fc1_weight, fc1_bias, out_features=hidden, scale=scale, activation=activation)
    return elastic_linear(inner, fc2_weight, fc2_bias, out_features=width, scale=scale)


Layers = Sequence[tuple[Tensor, Tensor | None]]
"""Weight and bias of each layer."""


def elastic_head_mlps(x: Tensor, mlps: Sequence[Layers], *, scale: Scale = "offset") -> list[Tensor]:
    """Apply several MLPs to the same rows, with a GELU between layers; each layer an `elastic_linear`.

    Args:
        x: `[rows, w]`.
        mlps: layers `[n, k]` of each, as many as it has; the first may be wider than `x`.
        scale: of every layer, as in `elastic_linear`; the offset scale of all but the first is 1.

    Returns:
        `[rows, n]` of each MLP's last layer, the dtype of the matrix product.

    Raises:
        ValueError, TypeError, RuntimeError: as `elastic_linear`.

    Numerics: as of `elastic_linear`; the gradients of `x` are added in fp32.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_head_mlps
        >>> first, second = (torch.randn(20, 8), None), (torch.randn(3, 20), torch.zeros(3))
        >>> [y.shape for y in elastic_head_mlps(torch.randn(5, 6), [[first, second], [first]])]
        [torch.Size([5, 3]), torch.Size([5, 20])]
    """
    op = "elastic_head_mlps"
    for layers in mlps:
        width = x.shape[-1]
        for weight, bias in layers:
            validate.prefix(op, "width", width, weight.shape[1])
            validate.operands(op, x=x, weight=weight, bias=bias)
            validate.vectors(op, x, bias=(bias, weight.shape[0]))
            width = weight.shape[0]
    if linear_backend(op, x).backend == "triton":
        from elastic_kernels.triton_ops.head_mlps import HeadMlpsFunction

        specs = [
            [
                layer_spec(x, w, w.shape[0], width=None if place == 0 else w.shape[1], scale=scale)
                for place, (w, _) in enumerate(layers)
            ]
            for layers in mlps
        ]
        parameters = [tensor for layers in mlps for layer in layers for tensor in layer]
        return list(HeadMlpsFunction.apply(x, specs, *parameters))
    outputs = []
    for layers in mlps:
        h = x
        for weight, bias in layers[:-1]:
            h = elastic_linear(h, weight, bias, scale=scale, activation="gelu")
        outputs.append(elastic_linear(h, *layers[-1], scale=scale))
    return outputs


def elastic_swiglu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    hidden: int | None = None,
    scale: Scale = "offset",
    activation: str = "silu",
) -> Tensor:
    """Apply a gated MLP: `fc2(act(g) * u)`, where `g` and `u` are prefixes of two halves of `fc1(x)`.

    Args:
        x: `[..., w]`.
        fc1_weight, fc1_bias: `[2 * hidden_max, w_max]`, `[2 * hidden_max]`, the rows of the gate, then of the
            units; as timm's `SwiGLUPacked`.
        fc2_weight, fc2_bias: `[w_max, hidden_max]`, `[w_max]`.
        hidden, scale: as in `elastic_mlp`.
        activation: of the gate, as in `elastic_linear`; with a GELU the layer is called GEGLU.

    Returns:
        `[..., w]`, the dtype of the matrix product.

    Raises:
        ValueError, TypeError, RuntimeError: as `elastic_mlp`.

    Numerics: as of `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_swiglu
        >>> fc1, fc2 = torch.randn(2 * 96, 64), torch.randn(64, 96)
        >>> elastic_swiglu(torch.randn(5, 32), fc1, None, fc2, None, hidden=40).shape
        torch.Size([5, 32])
    """
    op, width = "elastic_swiglu", x.shape[-1]
    require_gated(op, fc1_weight, fc2_weight)
    validate.prefix(op, "width", width, fc1_weight.shape[1])
    validate.one_of(op, "activation", activation, ACTIVATIONS)
    h = gated_units(op, x.reshape(-1, width), fc1_weight, fc1_bias, hidden, scale, activation)
    y = elastic_linear(h, fc2_weight, fc2_bias, out_features=width, scale=scale)
    return y.view(*x.shape[:-1], width)


def require_gated(op: str, fc1_weight: Tensor, fc2_weight: Tensor) -> None:
    """Raise ValueError unless the weights are those of a gated MLP."""
    rows, largest = fc1_weight.shape
    if tuple(fc2_weight.shape) != (largest, rows // 2) or rows % 2:
        shapes = f"{tuple(fc1_weight.shape)} and {tuple(fc2_weight.shape)}"
        raise ValueError(f"{op}: expected fc1_weight [2 * H, C] and fc2_weight [C, H], got {shapes}")


def gated_units(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: int | None,
    scale: Scale,
    activation: str,
) -> Tensor:
    """`[rows, w]` -> `[rows, hidden]`: the first layer of a gated MLP and its gate."""
    hidden = active_hidden(op, hidden, weight[: weight.shape[0] // 2], x.shape[1])
    return gated(op, stacked_linear(op, x, weight, bias, 2, hidden, scale), activation)


def gated(op: str, h: Tensor, activation: str) -> Tensor:
    """`[rows, 2, hidden]` -> `[rows, hidden]`: the activation of the gate times the units."""
    if linear_backend(op, h).backend == "triton":
        from elastic_kernels.triton_ops.swiglu import SwiGLUFunction

        return SwiGLUFunction.apply(h, activation)
    return ACTIVATIONS[activation](h[:, 0]) * h[:, 1]


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
