"""Targets and losses: Sinkhorn-Knopp, centering, cross-entropy, KoLeo.

Logits are float32 `[rows, prototypes]`. Reductions over ranks go through `torch.distributed` when a process
group is initialised; the rows of a rank may be any number, also none.

Source: POA (Zhang et al., ECCV 2024), section 3.4; DINOv2 (Oquab et al., 2023); Sablayrolles et al., 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def sinkhorn(logits: Sequence[Tensor], temperature: float, iterations: int = 3) -> list[Tensor]:
    """Soft assignments of rows to prototypes with equal use of every prototype over all ranks.

    Each entry of `logits` is a problem of its own. With `S = t / temperature`, the iterations alternate
    `log u_k = -logsumexp_rows(S + log v)` and `log v_b = -logsumexp_k(S + log u)`; the result is
    `softmax_k(S + log u)`. This is the official algorithm (its constants cancel) in the log domain, where
    nothing overflows.

    Args:
        logits: teacher logits `[rows_i, prototypes_i]` of each problem; the rows of this rank.
        temperature: of the teacher.
        iterations: how often both directions are normalised.

    Returns:
        Targets of the same shapes, float32, rows summing to 1.
    """
    scores = [t.to(torch.promote_types(t.dtype, torch.float32)) / temperature for t in logits]
    log_v = [s.new_zeros(s.shape[0], 1) for s in scores]
    log_u: list[Tensor] = [s.new_zeros(s.shape[1]) for s in scores]
    for iteration in range(iterations):
        sums = _logsumexp_over_rows([s + v for s, v in zip(scores, log_v, strict=True)])
        log_u = [-x for x in sums]
        if iteration < iterations - 1:
            log_v = [-torch.logsumexp(s + u, dim=1, keepdim=True) for s, u in zip(scores, log_u, strict=True)]
    return [torch.softmax(s + u, dim=1) for s, u in zip(scores, log_u, strict=True)]


def _logsumexp_over_rows(scores: Sequence[Tensor]) -> list[Tensor]:
    """Column-wise logsumexp of every problem over the rows of all ranks, one buffer for all problems."""
    sizes = [s.shape[1] for s in scores]
    largest = torch.cat([s.amax(0) if len(s) else s.new_full((s.shape[1],), -torch.inf) for s in scores])
    _all_reduce(largest, dist.ReduceOp.MAX)
    # A problem without rows on any rank has nothing to normalise; 0 keeps it finite.
    largest = torch.where(largest.isfinite(), largest, 0.0)
    shifted = zip(scores, largest.split(sizes), strict=True)
    total = torch.cat([(s - m).exp().sum(0) for s, m in shifted])
    _all_reduce(total, dist.ReduceOp.SUM)
    return list((largest + total.log()).split(sizes))


@torch.no_grad()
def centered(logits: Sequence[Tensor], centers: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """Targets `softmax((t - center) / temperature)` of each head."""
    return [torch.softmax((t - c) / temperature, dim=-1) for t, c in zip(logits, centers, strict=True)]


@torch.no_grad()
def update_centers(
    centers: Sequence[Tensor],
    logits: Sequence[Tensor],
    momentum: float = 0.9,
    *,
    equal_ranks: bool = False,
) -> None:
    """Move each center in place towards the mean logit over all ranks.

    Args:
        centers: `[prototypes_i]` of each head.
        logits: `[rows, prototypes_i]` of each head; the rows of this rank, the same number for all heads.
        momentum: what a center keeps of itself.
        equal_ranks: average the ranks' means (official), instead of all rows (exact, the two differ when
            ranks hold different numbers of rows). A rank without rows is left out either way, and without
            rows anywhere the centers stay.
    """
    rows = logits[0].shape[0]
    weight = (1.0 / max(rows, 1)) if equal_ranks else 1.0
    count = torch.tensor([float(rows > 0) if equal_ranks else float(rows)], device=logits[0].device)
    total = torch.cat([count, *(t.float().sum(0) * weight for t in logits)])
    _all_reduce(total, dist.ReduceOp.SUM)
    share = torch.where(total[0] > 0, 1 - momentum, 0.0)
    mean = total[1:] / total[0].clamp(min=1)
    for center, batch_mean in zip(centers, mean.split([c.numel() for c in centers]), strict=True):
        center.lerp_(batch_mean.to(center.dtype), share.to(center.dtype))


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op)


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """`log_softmax(logits / temperature)` in at least float32."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def cross_entropy(log_p: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy `-sum_k target_k log_p_k` of each row; leading dimensions broadcast."""
    return -(target * log_p).sum(-1)


def koleo(x: Tensor) -> Tensor:
    """KoLeo regulariser: minus the mean log distance to the nearest neighbour on the unit sphere.

    Args:
        x: `[rows, channels]`; computed in at least float32.

    Returns:
        A scalar; 0 for fewer than two rows, which have no neighbour.
    """
    eps = 1e-8
    if x.shape[0] < 2:
        return x.sum() * 0.0
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=eps)
        with torch.no_grad():
            similarity = x @ x.t()
            nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
        distance = F.pairwise_distance(x, x[nearest], eps=eps)
        return -torch.log(distance + eps).mean()
