"""The targets; cross-entropies and KoLeo are operators of `elastic_kernels`.

Logits are float32 `[rows, prototypes]`. Reductions over ranks go through `torch.distributed` when a process
group is initialised; the rows of a rank may be any number, also none.

Source: POA (Zhang et al., ECCV 2024), section 3.4; DINOv2 (Oquab et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import koleo as koleo
from elastic_kernels import sinkhorn_scaling, without_autocast
from poa.options import Options, option


@dataclass(frozen=True)
class LossConfig(Options, at="method.loss"):
    """Weights and temperatures of the loss."""

    intact: float = option(
        0.8, "lambda: weight of the intact student's losses; the elastic one's have 1 - lambda", "[0, 1]"
    )
    dino: float = option(1.0, "weight of the DINO (class-token) loss", "[0, 1000]")
    ibot: float = option(1.0, "weight of the iBOT (masked-patch) loss", "[0, 1000]")
    distill: float = option(1.0, "weight of distillation from the intact to the elastic student", "[0, 1000]")
    features: float = option(
        0.0, "weight of feature distillation from the teacher, or from method.teacher.frozen", "[0, 1000]"
    )
    koleo: float = option(0.1, "weight of the KoLeo regulariser", "[0, 1000]")
    student_temperature: float = option(0.1, "softmax temperature of both students", "[0.0001, 100]")
    targets: Literal["sinkhorn", "centering"] = option(
        "sinkhorn", "how teacher logits become targets: Sinkhorn-Knopp, or centering and softmax"
    )
    center_momentum: float = option(0.9, "momentum of the centers, with targets=centering", "[0, 1]")
    operands: Literal["fp32", "fp16"] = option(
        "fp32", "dtype of features and prototypes in matrix products, and of the stored teacher logits"
    )
    center_weighting: Literal["exact", "official"] = option(
        "exact", "centers follow the mean over all rows of a step, or the mean of its micro-batches' means"
    )

    @property
    def through_heads(self) -> bool:
        """Whether any term goes through the projection heads."""
        return bool(self.dino or self.ibot or self.distill)


def feature_distillation(tokens: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Scalar: how the similarities of every image to the others differ from those that the teacher sees.

    KL divergence of the softmax over the others, mean over rows, of `[rows, w]` from `[rows, W]`; no heads
    are needed. Source: SEED (Fang et al., ICLR 2021); the queue is the micro-batch, of each network its own.
    """

    def log_shares(x: Tensor) -> Tensor:
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
        rows, similarities = len(x), x @ x.t() / temperature
        others = similarities.flatten()[1:].view(rows - 1, rows + 1)[:, :-1].reshape(rows, rows - 1)
        return others.log_softmax(1)

    with without_autocast(tokens.device):
        return F.kl_div(log_shares(tokens), log_shares(teacher), log_target=True, reduction="batchmean")


@dataclass(frozen=True)
class SoftTargets:
    """Targets of one head, kept as what they are made of: `softmax(logits / temperature + log_scale)`.

    Attributes:
        logits: of the teacher, `[rows, prototypes]`.
        log_scale: `[prototypes]`, at least float32.
        temperature: of the teacher.
    """

    logits: Tensor
    log_scale: Tensor
    temperature: float

    def split(self, rows: Sequence[int]) -> list[SoftTargets]:
        """The targets of so many rows each, one after the other."""
        return [replace(self, logits=part) for part in self.logits.split(list(rows))]

    def dense(self) -> Tensor:
        """The targets themselves, at least float32, rows summing to 1."""
        wide = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return torch.softmax(wide / self.temperature + self.log_scale, dim=-1)


def sinkhorn(logits: Sequence[Tensor], temperature: float) -> list[SoftTargets]:
    """Soft assignments of rows to prototypes with equal use of every prototype over all ranks.

    Each entry of `logits`, the teacher's `[rows_i, prototypes_i]` of this rank, is a problem of its own; see
    `elastic_kernels.sinkhorn_scaling`. This is the official algorithm (its constants cancel) in the log
    domain.
    """
    scaling = sinkhorn_scaling(logits, temperature, reduce=_reduce)
    return [SoftTargets(t, log_u, temperature) for t, log_u in zip(logits, scaling, strict=True)]


def _reduce(tensor: Tensor, how: Literal["max", "sum"]) -> None:
    _all_reduce(tensor, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)


def centered(logits: Sequence[Tensor], centers: Sequence[Tensor], temperature: float) -> list[SoftTargets]:
    """Targets `softmax((t - center) / temperature)` of each head."""
    return [SoftTargets(t, -c / temperature, temperature) for t, c in zip(logits, centers, strict=True)]


@torch.no_grad()
def update_centers(
    centers: Sequence[Tensor],
    logits: Sequence[Tensor],
    momentum: float = 0.9,
    *,
    micro_batches: Sequence[int] | None = None,
) -> None:
    """Move each center in place towards the mean logit over all ranks.

    A mean that is NaN or inf, and no rows anywhere, leave the centers as they are.

    Args:
        centers: `[prototypes_i]` of each head.
        logits: `[rows, prototypes_i]` of each head; the rows of this rank, the same number for all heads.
        momentum: what a center keeps of itself.
        micro_batches: rows of each micro-batch of this rank: average the micro-batches' means (official,
            where a rank is a micro-batch); None: average all rows (exact; the two differ when micro-batches
            hold different numbers of rows). A micro-batch without rows is left out either way.
    """
    wide = [t.float() for t in logits]
    if micro_batches is None:
        count, sums = float(logits[0].shape[0]), [t.sum(0) for t in wide]
    else:
        filled = [rows for rows in micro_batches if rows]
        count = float(len(filled))
        sums = [sum((part.mean(0) for part in t.split(filled)), t.new_zeros(t.shape[1])) for t in wide]
    total = torch.cat([wide[0].new_full((1,), count), *sums])
    _all_reduce(total, dist.ReduceOp.SUM)
    share = torch.where((total[0] > 0) & total.isfinite().all(), 1 - momentum, 0.0)
    mean = (total[1:] / total[0].clamp(min=1)).nan_to_num(0.0, 0.0, 0.0)
    for center, batch_mean in zip(centers, mean.split([c.numel() for c in centers]), strict=True):
        center.lerp_(batch_mean.to(center.dtype), share.to(center.dtype))


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op)
