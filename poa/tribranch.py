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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic_kernels import prototype_cross_entropy, without_autocast
from poa import losses
from poa.device import on_side_stream, side_stream, wait_stream
from poa.losses import LossConfig, SoftTargets
from poa.masks import Masks
from poa.network import VIEWS, Batch, Network, StudentOutput

OPERANDS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Targets:
    """What the students learn, per head: of `cls` rows `2 B` (views swapped), of `patches` rows `masked`.

    `tokens`, for feature distillation, are the teacher's class tokens `[2 B, w]`, views as they are.
    On a GPU the scaling vectors come out of `stream`, to be joined before anything here is used or dropped.
    """

    cls: list[SoftTargets]
    patches: list[SoftTargets]
    stream: torch.cuda.Stream | None = None
    tokens: Tensor | None = None


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
    teacher: Network, batches: Sequence[Batch], temperature: float, config: LossConfig, centers: Centers
) -> list[Targets]:
    """Targets of this process's micro-batches of a step, over all micro-batches of all processes.

    With centering, the centers are those before this step and then move. Sinkhorn, with its reductions over
    processes, runs beside what follows.
    """
    outputs = [teacher.teacher_logits(batch, OPERANDS[config.operands]) for batch in batches]
    heads = len(outputs[0][0])
    # A problem is the class tokens, or the patches, of a head: a part for each micro-batch.
    parts = list(zip(*([*cls, *patches] for cls, patches, _ in outputs), strict=True))
    logits = [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in parts]
    counts = [[len(rows) for rows in part] for part in parts]
    stream = None
    if config.targets == "sinkhorn":
        stream = side_stream(batches[0].global_crops.device, "targets")
        with on_side_stream(stream):
            targets = losses.sinkhorn(logits, temperature)
    else:
        targets = losses.centered(logits, [*centers.cls, *centers.patches], temperature)
        for means, part in ((centers.cls, slice(heads)), (centers.patches, slice(heads, None))):
            rows = counts[part][0] if config.center_weighting == "official" else None
            losses.update_centers(means, logits[part], config.center_momentum, micro_batches=rows)
    split = (target.split(rows) for target, rows in zip(targets, counts, strict=True))
    tokens = [each[2] if config.features else None for each in outputs]
    return [
        Targets(list(each[:heads]), list(each[heads:]), stream, seen)
        for each, seen in zip(zip(*split, strict=True), tokens, strict=True)
    ]


Terms = dict[str, Tensor]
"""Terms of the loss by name, `[heads]` each."""


@dataclass(frozen=True)
class HeadLosses:
    """Terms of the loss of a micro-batch, without those that a backward leaves out.

    Attributes:
        intact: "dino" and "ibot", CE(intact, targets).
        elastic: the same of the elastic student, and "distill", CE(elastic, intact).
    """

    intact: Terms | None
    elastic: Terms | None

    @classmethod
    def of(
        cls, students: Sequence[StudentOutput], targets: Targets, batch: Batch, config: LossConfig
    ) -> HeadLosses:
        """Those of the intact student, and of the elastic one if there is one."""
        entropies = _cross_entropies(students, targets, batch, config)
        intact, *elastic = [
            {"dino": _dino(rows.cls, batch), "ibot": _ibot(rows.patches, batch.masks)}
            for rows in entropies[: len(students)]
        ]
        if not elastic:
            return cls(intact, None)
        return cls(intact, elastic[0] | {"distill": _distill(entropies[-1].cls, batch)})

    def named(self) -> dict[str, Tensor]:
        """Detached scalars by student, term and head."""
        students = {"intact": self.intact or {}, "elastic": self.elastic or {}}
        terms = {f"{k}.{name}": x.detach() for k, terms in students.items() for name, x in terms.items()}
        heads = range(len(next(iter(terms.values()))))
        return {f"{name}.{head}": x[head] for head in heads for name, x in terms.items()}


def tribranch_loss(
    intact: StudentOutput, elastic: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and its terms.

    Returns:
        The scalar to differentiate, and detached unweighted terms named `STUDENT.TERM.HEAD` (`intact.dino.0`,
        `elastic.distill.3`) and `koleo`.
    """
    terms = HeadLosses.of([intact, elastic], targets, batch, config)
    return _loss(terms, [intact, elastic], targets, config)


def intact_loss(
    intact: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the intact student."""
    return _loss(HeadLosses.of([intact], targets, batch, config), [intact], targets, config)


def elastic_loss(
    intact: StudentOutput, elastic: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the elastic student; no gradient reaches the intact one."""
    terms = HeadLosses.of([intact.detached(), elastic], targets, batch, config)
    return _loss(replace(terms, intact=None), [elastic], targets, config)


def _loss(
    terms: HeadLosses, students: Sequence[StudentOutput], targets: Targets, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula above, or the summands of it that are there; and all terms by name."""
    weight, summands = config.intact, list[Tensor]()
    if terms.intact:
        summands.append(weight * _weighted(terms.intact, config))
    if terms.elastic:
        summands.append((1 - weight) * _weighted(terms.elastic, config))
        summands.append((1 - weight) * terms.elastic["distill"])
    loss, named = sum(summands[1:], summands[0]).mean(), terms.named()
    if targets.tokens is not None:
        shares = [weight] * bool(terms.intact) + [1 - weight] * bool(terms.elastic)
        features = [
            share * losses.feature_distillation(student.tokens, targets.tokens, config.student_temperature)
            for share, student in zip(shares, students, strict=True)
        ]
        named["features"] = torch.stack(features).sum().detach()
        loss = loss + config.features * sum(features[1:], features[0])
    if config.koleo:
        koleo = losses.koleo(*(student.tokens for student in students), groups=VIEWS) / 2
        named["koleo"] = koleo.detach()
        loss = loss + config.koleo * koleo
    return loss, named


def _weighted(terms: Terms, config: LossConfig) -> Tensor:
    """CE(student, targets) of each head."""
    return config.dino * terms["dino"] + config.ibot * terms["ibot"]


@dataclass(frozen=True)
class RowLosses:
    """Cross-entropies of a student, of all heads.

    Attributes:
        cls: `[heads, L B + 2 B]`, of class tokens of local crops, then of global ones.
        patches: `[heads, masked]`.
    """

    cls: Tensor
    patches: Tensor


def _cross_entropies(
    students: Sequence[StudentOutput], targets: Targets, batch: Batch, config: LossConfig
) -> list[RowLosses]:
    """Of one or two students with the teacher's targets; of two, also of the second with the first."""
    wait_stream(targets.stream)
    rows = _TargetRows.of(batch)

    def of_head(head: int, features: Sequence[Tensor]) -> list[Tensor]:
        """`[rows]` of each student, and of two of the second with the first."""
        prototypes, (cls, patches) = students[-1].prototypes[head], (targets.cls[head], targets.patches[head])
        with without_autocast(prototypes.device):
            return prototype_cross_entropy(
                features, prototypes, [cls.logits, patches.logits], [cls.log_scale, patches.log_scale],
                [rows.classes, rows.patches],
                student_temperature=config.student_temperature, teacher_temperature=cls.temperature,
                operands=OPERANDS[config.operands],
            )  # fmt: skip

    features = zip(*(student.features for student in students), strict=True)
    of_heads = [of_head(head, of_students) for head, of_students in enumerate(features)]
    sizes = [len(rows.classes), len(rows.patches)]
    return [RowLosses(*torch.stack(losses).split(sizes, 1)) for losses in zip(*of_heads, strict=True)]


@dataclass(frozen=True)
class _TargetRows:
    """Which targets each row of a student learns from, `[rows, 2]` and `[rows, 1]`, -1 for none.

    Attributes:
        classes: local crops learn from both views of their image, global ones from the other view, whose
            target stands in their own row.
        patches: each from its own.
    """

    classes: Tensor
    patches: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _TargetRows:
        device, images = batch.global_crops.device, batch.global_crops.shape[0] // VIEWS
        own = torch.arange(VIEWS * images, device=device)
        both = own.view(VIEWS, images).t()
        return cls(
            torch.cat(
                [both.repeat(batch.local_views, 1), torch.stack([own, torch.full_like(own, -1)], dim=1)]
            ),
            torch.arange(len(batch.masks.indices), device=device).unsqueeze(1),
        )


def _dino(losses: Tensor, batch: Batch) -> Tensor:
    """Cross-view loss of the class tokens: every local crop against both views, each view against the other.

    `[heads, rows]` -> `[heads]`. The sum over pairs is divided by their number as the official code counts
    it: the global pairs twice.
    """
    pairs = VIEWS + max(VIEWS * batch.local_views, 1)
    local, whole = losses.split([batch.local_crops.shape[0], batch.global_crops.shape[0]], dim=1)
    loss = VIEWS * whole.mean(1)
    if batch.local_views:
        loss = loss + local.unflatten(1, (batch.local_views, -1)).mean(2).sum(1)
    return loss / pairs


def _ibot(losses: Tensor, masks: Masks) -> Tensor:
    """Masked-patch loss: mean over an image's masked patches, then over all global crops, masked or not.

    `[heads, masked]` -> `[heads]`.
    """
    return (losses * masks.weights).sum(1) / masks.mask.shape[0]


def _distill(losses: Tensor, batch: Batch) -> Tensor:
    """Same-view distillation of the class tokens: the elastic student follows the intact one.

    `[heads, rows]` -> `[heads]`. Local and global crops count alike; the target is the intact student's plain
    softmax.
    """
    parts = losses.split([batch.local_crops.shape[0], batch.global_crops.shape[0]], dim=1)
    return torch.stack([part.mean(1) for part in parts if part.shape[1]]).sum(0)
