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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_kernels import prototype_cross_entropy, upload, without_autocast
from poa import losses
from poa.device import on_side_stream, side_stream, wait_stream
from poa.loss_rows import TERMS
from poa.losses import LossConfig, SoftTargets
from poa.network import VIEWS, Batch, Network, StudentOutput

OPERANDS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Targets:
    """What the students learn, per head: of `cls` rows `2 B` (views swapped), of `patches` rows `masked`.

    `tokens`, for feature distillation, are the teacher's class tokens `[2 B, w]`, views as they are, or those
    of a frozen teacher.
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
    teacher: Network,
    batches: Sequence[Batch],
    temperature: float,
    config: LossConfig,
    centers: Centers,
    frozen: Callable[[Tensor], Tensor] | None = None,
) -> list[Targets]:
    """Targets of this process's micro-batches of a step, over all micro-batches of all processes.

    With centering, the centers are those before this step and then move. Sinkhorn, with its reductions over
    processes, runs beside what follows. Class tokens are those that `frozen` makes of the global crops, if
    there is another teacher.
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
    tokens = [seen if config.features else None for _, _, seen in outputs]
    if frozen:
        tokens = [frozen(batch.global_crops) for batch in batches]
    return [
        Targets(list(each[:heads]), list(each[heads:]), stream, seen)
        for each, seen in zip(zip(*split, strict=True), tokens, strict=True)
    ]


# Cross-entropies of rows: of each student with the teacher's targets, of the elastic one with the intact.
ENTROPIES = ("intact", "elastic", "distillation")


def tribranch_loss(
    intact: StudentOutput, elastic: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and its terms.

    Returns:
        The scalar to differentiate, and detached unweighted terms named `STUDENT.TERM.HEAD` (`intact.dino.0`,
        `elastic.distill.3`) and `koleo`.
    """
    entropies = _cross_entropies([intact, elastic], targets, batch, config)
    named = dict(zip(ENTROPIES, entropies, strict=True))
    return _loss(named, {"intact": intact, "elastic": elastic}, targets, batch, config)


def intact_loss(
    intact: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the intact student."""
    (entropy,) = _cross_entropies([intact], targets, batch, config)
    return _loss({"intact": entropy}, {"intact": intact}, targets, batch, config)


def elastic_loss(
    intact: StudentOutput, elastic: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the elastic student; no gradient reaches the intact one."""
    _, *entropies = _cross_entropies([intact.detached(), elastic], targets, batch, config)
    named = dict(zip(ENTROPIES[1:], entropies, strict=True))
    return _loss(named, {"elastic": elastic}, targets, batch, config)


def _loss(
    entropies: dict[str, list[Tensor]],
    students: dict[str, StudentOutput],
    targets: Targets,
    batch: Batch,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula above, or the summands of it that are there; and all terms by name.

    Args:
        entropies: `[rows]` of each head, by which of `ENTROPIES` they are.
        students: with terms of their own, by name.
        targets: of the teacher.
        batch: of the rows.
        config: of the loss.
    """
    loss, terms = _weighted(entropies, batch.loss_rows.weights, config)
    if targets.tokens is not None:
        distilled = [
            _share(name, config)
            * losses.feature_distillation(student.tokens, targets.tokens, config.student_temperature)
            for name, student in students.items()
        ]
        terms["features"] = sum(distilled[1:], distilled[0])
        loss = loss + config.features * terms["features"]
    if config.koleo:
        terms["koleo"] = losses.koleo(*(student.tokens for student in students.values()), groups=VIEWS) / 2
        loss = torch.add(loss, terms["koleo"], alpha=config.koleo)
    return loss, {name: term.detach() for name, term in terms.items()}


def _weighted(
    entropies: dict[str, list[Tensor]], weights: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-entropies' share of the loss, a weighted sum over all rows at once; and their terms by name.

    Args:
        entropies: `[rows]` of each head, by which of `ENTROPIES` they are.
        weights: `[rows, TERMS]`, of each row in each term.
        config: of the loss.
    """
    heads, used = len(next(iter(entropies.values()))), [_terms(name, config) for name in entropies]
    rows = torch.stack([row for of_heads in entropies.values() for row in of_heads]).unflatten(0, (-1, heads))
    weights = weights.to(rows.dtype)
    factors = torch.tensor([[terms.get(term, 0.0) / heads for term in TERMS] for terms in used])
    of_rows = (upload(factors.to(rows.dtype), rows.device).unsqueeze(1) * weights).sum(-1)
    shown = (rows.detach().unsqueeze(-1) * weights).sum(-2)  # [entropies, heads, terms]
    named = {
        f"{_student(name)}.{term}.{head}": shown[number, head, TERMS.index(term)]
        for head in range(heads)
        for number, (name, terms) in enumerate(zip(entropies, used, strict=True))
        for term in terms
    }
    return (rows * of_rows.unsqueeze(1)).sum(), named


def _terms(name: str, config: LossConfig) -> dict[str, float]:
    """The terms that a cross-entropy has a share in, and their factors."""
    share = _share(name, config)
    if name == "distillation":
        return {"distill": share * config.distill}
    return {"dino": share * config.dino, "ibot": share * config.ibot}


def _share(name: str, config: LossConfig) -> float:
    return config.intact if name == "intact" else 1 - config.intact


def _student(name: str) -> str:
    return "elastic" if name == "distillation" else name


def _cross_entropies(
    students: Sequence[StudentOutput], targets: Targets, batch: Batch, config: LossConfig
) -> list[list[Tensor]]:
    """Of one or two students with the teacher's targets; of two, also of the second with the first: `[rows]`
    of each head."""
    wait_stream(targets.stream)
    rows = batch.loss_rows

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
    return [list(of_all) for of_all in zip(*of_heads, strict=True)]
