"""KoLeo: a regulariser that spreads rows over the unit sphere.

    u = x / |x|,  koleo = -mean_i log(|u_i - u_n(i)| + 1e-8),  n(i) the row whose u is nearest to u_i

The Triton kernels are in `triton_ops/koleo.py`.

Source: Sablayrolles et al., 2019; DINOv2 (Oquab et al., 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate
from elastic_kernels.layer_norm import MAX_WIDTH

EPS = 1e-8


def koleo(*rows: Tensor, groups: int = 1) -> Tensor:
    """Minus the mean log distance of rows to their nearest neighbour, summed over groups of rows.

    Args:
        rows: matrices `[n, channels]`, of any sizes, computed in at least float32.
        groups: of equally many consecutive rows in each matrix, which know nothing of each other.

    Returns:
        A scalar, 0 of groups with fewer than two rows, which have no neighbour.

    Raises:
        ValueError: no matrix, or one that does not fall into so many groups.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: on Triton sums are fp32. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import koleo
        >>> koleo(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor(-0.3466)
    """
    if not rows or any(x.dim() != 2 or len(x) % groups for x in rows):
        shapes = [tuple(x.shape) for x in rows]
        raise ValueError(f"koleo: expected matrices of {groups} groups of rows each, got {shapes}")
    validate.operands("koleo", **{f"rows {i}": x for i, x in enumerate(rows)})
    widest = max(x.shape[1] for x in rows)
    limit = f"the kernel takes widths up to {MAX_WIDTH}, got {widest}" if widest > MAX_WIDTH else None
    if dispatch.choose("koleo", rows[0], limit).backend == "triton":
        from elastic_kernels.triton_ops.koleo import KoleoFunction

        return KoleoFunction.apply(groups, torch.is_grad_enabled(), *rows)
    parts = [part for x in rows for part in x.chunk(groups)]
    return sum((_reference(part) for part in parts), parts[0].new_zeros(()))


def _reference(x: Tensor) -> Tensor:
    """Of one group."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[0] < 2:
        return x.sum() * 0.0
    with dispatch.without_autocast(x.device):
        x = F.normalize(x, dim=-1, eps=EPS)
        with torch.no_grad():
            similarity = x @ x.t()
            nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
        distance = F.pairwise_distance(x, x[nearest], eps=EPS)
        return -torch.log(distance + EPS).mean()
