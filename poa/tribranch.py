"""One step of the method: teacher targets, two students, one loss.

    targets   = sinkhorn(teacher(global crops))                      no gradient
    intact    = student(masked global crops, local crops)            all weights
    elastic   = student(the same crops) inside a subnet              a prefix of the same weights
    loss      = lambda CE(intact, targets) + (1 - lambda) [CE(elastic, targets) + CE(elastic, intact)]
                + KoLeo

Every function is free of state; what a step needs is in the small frozen classes below.

Source: POA (Zhang et al., ECCV 2024), algorithm 1; official `SSLMetaArch.forward_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from poa import losses
from poa.backbones import ElasticViT, ViTConfig
from poa.data.masking import Masks
from poa.heads import HeadConfig, ProjectionHeads
from poa.multicrop import StochasticDepth
from poa.options import option
from poa.subnets import Subnet

VIEWS = 2  # global crops of an image


@dataclass(frozen=True)
class LossConfig:
    """Weights and temperatures of the loss."""

    intact: float = option(0.8, "lambda: weight of the intact student; the elastic one has 1 - lambda")
    dino: float = option(1.0, "weight of the class-token loss")
    ibot: float = option(1.0, "weight of the masked-patch loss")
    koleo: float = option(0.1, "weight of the KoLeo regulariser")
    student_temperature: float = option(0.1, "temperature of both students")
    targets: Literal["sinkhorn", "centering"] = option("sinkhorn", "how teacher logits become targets")
    center_momentum: float = option(0.9, "momentum of the centers (centering)")
    center_weighting: Literal["exact", "official"] = option(
        "exact", "centers over ranks: mean over all rows, or mean of the ranks' means"
    )


@dataclass(frozen=True)
class Batch:
    """One chunk on the training device, crops in view-major order (all images of view 0, then of view 1).

    Attributes:
        global_crops: `[2 B, 3, S, S]`.
        local_crops: `[L B, 3, s, s]`, L >= 0.
        masks: of the global crops; nothing masked before iBOT starts.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Masks

    @property
    def local_views(self) -> int:
        """L, local crops of an image."""
        return VIEWS * self.local_crops.shape[0] // self.global_crops.shape[0]


@dataclass(frozen=True)
class Targets:
    """What the students learn, per head: `cls` `[2 B, K_i]` (views swapped), `patches` `[masked, K_i]`."""

    cls: list[Tensor]
    patches: list[Tensor]


@dataclass(frozen=True)
class StudentPass:
    """Which network a student forward uses, and the rows it keeps."""

    subnet: Subnet
    drop: StochasticDepth | None = None


@dataclass(frozen=True)
class StudentOutput:
    """Logits of a student, per head, and its class tokens `[2 B, w]` of the global crops."""

    local: list[Tensor]
    cls: list[Tensor]
    patches: list[Tensor]
    tokens: Tensor


class Network(nn.Module):
    """A backbone with its projection heads: the teacher is one, the students share another."""

    def __init__(self, backbone: ViTConfig, head: HeadConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.backbone = ElasticViT(backbone, generator)
        self.head = ProjectionHeads(backbone.max_width, head, generator)

    def forward(
        self, batch: Batch, passes: Sequence[StudentPass], recompute: bool = False
    ) -> list[StudentOutput]:
        """Run the students, one pass each; one call per step, so that DDP sees one forward."""
        return [self._student(batch, p, recompute) for p in passes]

    def _student(self, batch: Batch, run: StudentPass, recompute: bool) -> StudentOutput:
        crops, masks = [batch.global_crops], [batch.masks.mask, None]
        if batch.local_views:
            crops.append(batch.local_crops)
        whole, *parts = self.backbone(
            crops, run.subnet, masks=masks[: len(crops)], drop=run.drop, recompute=recompute
        )
        local = parts[0].cls if parts else whole.cls[:0]
        masked = whole.patches.flatten(0, 1).index_select(0, batch.masks.indices)
        rows = [local.shape[0], whole.cls.shape[0], masked.shape[0]]
        logits = self.head.split(torch.cat([local, whole.cls, masked]), rows)
        by_part = [[head[part] for head in logits] for part in range(3)]
        return StudentOutput(by_part[0], by_part[1], by_part[2], whole.cls)

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of the class tokens, views swapped so that A teaches B, and of the masked patches."""
        (features,) = self.backbone([batch.global_crops])
        cls = torch.cat(features.cls.chunk(VIEWS)[::-1])
        masked = features.patches.flatten(0, 1).index_select(0, batch.masks.indices)
        logits = self.head.split(torch.cat([cls, masked]), [cls.shape[0], masked.shape[0]])
        return [c for c, _ in logits], [p for _, p in logits]


@dataclass(frozen=True)
class Centers:
    """Running means of the teacher's logits, per head (centering only)."""

    cls: list[Tensor]
    patches: list[Tensor]

    @classmethod
    def zeros(cls, prototypes: Sequence[int], device: torch.device) -> Centers:
        return cls(*([torch.zeros(k, device=device) for k in prototypes] for _ in range(2)))


@torch.no_grad()
def teacher_targets(
    teacher: Network, batch: Batch, temperature: float, config: LossConfig, centers: Centers
) -> Targets:
    """Targets of a chunk. With centering, the centers are those before this chunk and then move."""
    cls, patches = teacher.teacher_logits(batch)
    if config.targets == "sinkhorn":
        both = losses.sinkhorn([*cls, *patches], temperature)
        return Targets(both[: len(cls)], both[len(cls) :])
    targets = Targets(
        losses.centered(cls, centers.cls, temperature),
        losses.centered(patches, centers.patches, temperature),
    )
    equal = config.center_weighting == "official"
    losses.update_centers(centers.cls, cls, config.center_momentum, equal_ranks=equal)
    losses.update_centers(centers.patches, patches, config.center_momentum, equal_ranks=equal)
    return targets


def tribranch_loss(
    intact: StudentOutput,
    elastic: StudentOutput,
    targets: Targets,
    batch: Batch,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a chunk and its terms.

    Returns:
        The scalar to differentiate, and detached unweighted terms named `STUDENT.TERM.HEAD` (`intact.dino.0`,
        `elastic.distill.3`) and `koleo`.
    """
    terms: dict[str, Tensor] = {}
    share = {"intact": config.intact, "elastic": 1 - config.intact}
    heads = len(targets.cls)
    total = intact.tokens.new_zeros((), dtype=torch.float32)
    for head in range(heads):
        weighted, head_terms = _head_loss(head, intact, elastic, targets, batch, config, share)
        total = total + weighted / heads
        terms |= head_terms
    if config.koleo:
        views = [view for s in (intact, elastic) for view in s.tokens.chunk(VIEWS)]
        terms["koleo"] = sum((losses.koleo(view) for view in views), total.new_zeros(())) / 2
        total = total + config.koleo * terms["koleo"]
    return total, {name: term.detach() for name, term in terms.items()}


def _head_loss(
    head: int,
    intact: StudentOutput,
    elastic: StudentOutput,
    targets: Targets,
    batch: Batch,
    config: LossConfig,
    share: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of one head and its unweighted terms."""
    log_p = {
        name: [
            losses.log_probabilities(logits[head], config.student_temperature)
            for logits in (student.local, student.cls, student.patches)
        ]
        for name, student in (("intact", intact), ("elastic", elastic))
    }
    terms = {}
    for name, (local, cls, patches) in log_p.items():
        terms[f"{name}.dino.{head}"] = _dino(local, cls, targets.cls[head], batch.local_views)
        terms[f"{name}.ibot.{head}"] = _ibot(patches, targets.patches[head], batch.masks)
    terms[f"elastic.distill.{head}"] = _distill(log_p["elastic"][:2], log_p["intact"][:2])
    weighted = sum(
        share[name]
        * (config.dino * terms[f"{name}.dino.{head}"] + config.ibot * terms[f"{name}.ibot.{head}"])
        for name in log_p
    )
    return weighted + share["elastic"] * terms[f"elastic.distill.{head}"], terms


def _dino(local: Tensor, cls: Tensor, target: Tensor, local_views: int) -> Tensor:
    """Cross-view loss of the class tokens: every local crop against both views, each view against the other.

    The sum over pairs is divided by their number as the official code counts it: the global pairs twice.
    """
    pairs = VIEWS + max(VIEWS * local_views, 1)
    loss = VIEWS * losses.cross_entropy(cls, target).mean()
    if local_views:
        both_views = target.unflatten(0, (VIEWS, -1)).sum(0)
        loss = loss + losses.cross_entropy(local.unflatten(0, (local_views, -1)), both_views).mean(1).sum()
    return loss / pairs


def _ibot(patches: Tensor, target: Tensor, masks: Masks) -> Tensor:
    """Masked-patch loss: mean over an image's masked patches, then over all global crops, masked or not."""
    return (losses.cross_entropy(patches, target) * masks.weights).sum() / masks.mask.shape[0]


def _distill(elastic: Sequence[Tensor], intact: Sequence[Tensor]) -> Tensor:
    """Same-view distillation of the class tokens: the elastic student follows the intact one.

    Local and global crops count alike; the target is the intact student's plain softmax.
    """
    parts = [
        losses.cross_entropy(student, teacher.detach().exp()).mean()
        for student, teacher in zip(elastic, intact, strict=True)
        if len(student)
    ]
    return torch.stack(parts).sum()
