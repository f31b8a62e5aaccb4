"""Elastic transformer MLP: two elastic linears around an exact GELU.

    y = fc2(gelu(fc1(x)))          hidden = int(w / w_max * hidden_max)

Source: POA (Zhang et al., ECCV 2024), section 3.2; official `DynamicMlp`.
"""

from __future__ import annotations

from torch import Tensor

from elastic_kernels.linear import elastic_linear, elastic_linear_residual


def elastic_hidden_features(width: int, max_width: int, max_hidden: int) -> int:
    """Hidden units of a subnet's MLP, `int(width / max_width * max_hidden)` in floating point.

    The truncation is the official one; it loses a unit for a few odd maxima (784 wide, subnet 64: 255).
    """
    return int(width / max_width * max_hidden)


def elastic_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """The MLP half of a block: both linears, GELU, LayerScale and the residual addition.

    Args:
        x: `[kept, w]`, normalised rows.
        fc1_weight, fc1_bias: `[hidden_max, w_max]`, `[hidden_max]`.
        fc2_weight, fc2_bias: `[w_max, hidden_max]`, `[w_max]`.
        residual, gamma, rows, row_scale: as in `elastic_linear_residual`.

    Returns:
        `[tokens, w]`, the dtype of `residual`.

    Raises:
        ValueError, TypeError: as `elastic_linear_residual`.
    """
    max_hidden, max_width = fc1_weight.shape
    width = x.shape[-1]
    hidden = elastic_linear(
        x,
        fc1_weight,
        fc1_bias,
        out_features=elastic_hidden_features(width, max_width, max_hidden),
        activation="gelu",
    )
    return elastic_linear_residual(
        hidden, fc2_weight, fc2_bias, residual, gamma, rows=rows, row_scale=row_scale
    )
