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

    On a GPU the scaling vectors come out of `stream`, to be joined before anything here is used or dropped.
    """

    cls: list[SoftTargets]
    patches: list[SoftTargets]
    stream: torch.cuda.Stream | None = None


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
    logits = [teacher.teacher_logits(batch, OPERANDS[config.operands]) for batch in batches]
    cls, cls_rows = _of_all_micro_batches([of_classes for of_classes, _ in logits])
    patches, patch_rows = _of_all_micro_batches([of_patches for _, of_patches in logits])
    stream = None
    if config.targets == "sinkhorn":
        stream = side_stream(batches[0].global_crops.device, "targets")
        with on_side_stream(stream):
            both = losses.sinkhorn([*cls, *patches], temperature)
    else:
        both = losses.centered([*cls, *patches], [*centers.cls, *centers.patches], temperature)
        equal, momentum = config.center_weighting == "official", config.center_momentum
        losses.update_centers(centers.cls, cls, momentum, micro_batches=cls_rows if equal else None)
        losses.update_centers(centers.patches, patches, momentum, micro_batches=patch_rows if equal else None)
    of_classes = [target.split(cls_rows) for target in both[: len(cls)]]  # of each head, then micro-batch
    of_patches = [target.split(patch_rows) for target in both[len(cls) :]]
    return [
        Targets(
            [head[micro_batch] for head in of_classes], [head[micro_batch] for head in of_patches], stream
        )
        for micro_batch in range(len(batches))
    ]


def _of_all_micro_batches(logits: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[int]]:
    """The rows of each head, given those of each micro-batch and head; and how many each micro-batch has."""
    heads = [[micro_batch[head] for micro_batch in logits] for head in range(len(logits[0]))]
    return [c[0] if len(c) == 1 else torch.cat(c) for c in heads], [
        len(micro_batch[0]) for micro_batch in logits
    ]


def tribranch_loss(
    intact: StudentOutput,
    elastic: StudentOutput,
    targets: Targets,
    batch: Batch,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and its terms.

    Returns:
        The scalar to differentiate, and detached unweighted terms named `STUDENT.TERM.HEAD` (`intact.dino.0`,
        `elastic.distill.3`) and `koleo`.
    """
    of_intact, of_elastic, of_both = _cross_entropies([intact, elastic], targets, batch, config)
    intact_terms, elastic_terms = _terms(of_intact, batch), _terms(of_elastic, batch)
    distill = _distill(of_both.cls, batch)
    loss = config.intact * _weighted(intact_terms, config)
    loss = loss + (1 - config.intact) * _weighted(elastic_terms, config) + (1 - config.intact) * distill
    terms = _named("intact", intact_terms) | _named("elastic", elastic_terms | {"distill": distill})
    return _with_koleo(loss.mean(), [intact, elastic], config, terms)


def intact_loss(
    intact: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the intact student."""
    (of_intact,) = _cross_entropies([intact], targets, batch, config)
    terms = _terms(of_intact, batch)
    loss = config.intact * _weighted(terms, config)
    return _with_koleo(loss.mean(), [intact], config, _named("intact", terms))


def elastic_loss(
    intact: StudentOutput, elastic: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the elastic student; no gradient reaches the intact one."""
    _, of_elastic, of_both = _cross_entropies([intact.detached(), elastic], targets, batch, config)
    terms, distill = _terms(of_elastic, batch), _distill(of_both.cls, batch)
    loss = (1 - config.intact) * _weighted(terms, config) + (1 - config.intact) * distill
    return _with_koleo(loss.mean(), [elastic], config, _named("elastic", terms | {"distill": distill}))


Terms = dict[str, Tensor]
"""Terms of the loss, `[heads]` each, by name."""


def _terms(losses: RowLosses, batch: Batch) -> Terms:
    """What a student learns from the teacher."""
    return {"dino": _dino(losses.cls, batch), "ibot": _ibot(losses.patches, batch.masks)}


def _weighted(terms: Terms, config: LossConfig) -> Tensor:
    return config.dino * terms["dino"] + config.ibot * terms["ibot"]


def _named(student: str, terms: Terms) -> Terms:
    return {f"{student}.{name}": term for name, term in terms.items()}


def _with_koleo(
    loss: Tensor, students: Sequence[StudentOutput], config: LossConfig, terms: Terms
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with the regulariser of the students' views, and all terms by head."""
    heads = range(len(students[0].features))
    terms = {f"{name}.{head}": term.detach()[head] for head in heads for name, term in terms.items()}
    if not config.koleo:
        return loss, terms
    views = [view for student in students for view in student.tokens.chunk(VIEWS)]
    koleo = sum((losses.koleo(view) for view in views), loss.new_zeros(())) / 2
    return loss + config.koleo * koleo, terms | {"koleo": koleo.detach()}


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
    count = len(rows.classes)

    def of_head(head: int, part: slice, target: SoftTargets, index: Tensor) -> Tensor:
        """`[students, rows]`, of two students `[3, rows]`."""
        prototypes = students[-1].prototypes[head]
        with without_autocast(prototypes.device):
            per_student = prototype_cross_entropy(
                [student.features[head][part] for student in students],
                prototypes, target.logits, target.log_scale, index,
                student_temperature=config.student_temperature, teacher_temperature=target.temperature,
                operands=OPERANDS[config.operands],
            )  # fmt: skip
        return torch.stack(per_student)

    cls, patches = [], []
    for head, (cls_target, patch_target) in enumerate(zip(targets.cls, targets.patches, strict=True)):
        cls.append(of_head(head, slice(count), cls_target, rows.classes))
        patches.append(of_head(head, slice(count, None), patch_target, rows.patches))
    of_classes, of_patches = torch.stack(cls, 1), torch.stack(patches, 1)
    return [RowLosses(*pair) for pair in zip(of_classes, of_patches, strict=True)]


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
