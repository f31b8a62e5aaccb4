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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kernels import prototype_cross_entropy, shared_gradients
from elastic_kernels.dispatch import without_autocast
from poa import losses
from poa.backbones import BackboneConfig
from poa.data.masking import Masks
from poa.device import beside, join, side_stream
from poa.heads import HeadConfig, ProjectionHeads
from poa.losses import SoftTargets
from poa.multicrop import StochasticDepth
from poa.options import Options, option
from poa.subnets import Subnet

VIEWS = 2  # global crops of an image
NAMES = ("intact", "elastic")  # the students
OPERANDS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class LossConfig(Options, at="method.loss"):
    """Weights and temperatures of the loss."""

    intact: float = option(
        0.8, "lambda: weight of the intact student; the elastic one has 1 - lambda", "[0, 1]"
    )
    dino: float = option(1.0, "weight of the class-token loss", "[0, 1000]")
    ibot: float = option(1.0, "weight of the masked-patch loss", "[0, 1000]")
    koleo: float = option(0.1, "weight of the KoLeo regulariser", "[0, 1000]")
    student_temperature: float = option(0.1, "softmax temperature of both students", "[0.0001, 100]")
    targets: Literal["sinkhorn", "centering"] = option("sinkhorn", "how teacher logits become targets")
    center_momentum: float = option(0.9, "momentum of the centers (centering)", "[0, 1]")
    operands: Literal["fp32", "fp16"] = option(
        "fp32", "dtype of features and prototypes in their products, and of the teacher logits that are kept"
    )
    center_weighting: Literal["exact", "official"] = option(
        "exact", "centers: from the mean over all rows of a step, or the mean of its chunks' means"
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
    def crops(self) -> list[Tensor]:
        """The groups of crops in the order in which students see them: local ones, if any, then global."""
        return [self.local_crops, self.global_crops][0 if self.local_views else 1 :]

    @property
    def local_views(self) -> int:
        """L, local crops of an image."""
        return VIEWS * self.local_crops.shape[0] // self.global_crops.shape[0]


@dataclass(frozen=True)
class Targets:
    """What the students learn, per head: of `cls` rows `2 B` (views swapped), of `patches` rows `masked`.

    On a GPU the scaling vectors come out of `stream`, to be joined before anything here is used or dropped.
    """

    cls: list[SoftTargets]
    patches: list[SoftTargets]
    stream: torch.cuda.Stream | None = None


@dataclass(frozen=True)
class StudentPass:
    """Which network a student forward uses, and the rows it keeps."""

    subnet: Subnet
    drop: StochasticDepth | None = None


@dataclass(frozen=True)
class StudentOutput:
    """What the losses need of a student.

    Attributes:
        features: `[L B + 2 B + masked, bottleneck]` of each head: local crops, global crops, masked patches.
        prototypes: `[prototypes_i, bottleneck]` of each head, the same for all students of a step.
        tokens: class tokens `[2 B, w]` of the global crops.
    """

    features: list[Tensor]
    prototypes: list[Tensor]
    tokens: Tensor

    def detached(self) -> StudentOutput:
        """The same numbers, which hold nothing of the graph."""
        features, prototypes = ([x.detach() for x in part] for part in (self.features, self.prototypes))
        return StudentOutput(features, prototypes, self.tokens.detach())


class Network(nn.Module):
    """A backbone with its projection heads: the teacher is one, the students share another."""

    def __init__(self, backbone: BackboneConfig, head: HeadConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.backbone = backbone.build(generator)
        self.head = ProjectionHeads(backbone.feature_width(backbone.space.intact), head, generator)

    def forward(
        self, batch: Batch, passes: Sequence[StudentPass], recompute: bool = False
    ) -> list[StudentOutput]:
        """Run the students, one pass each; one call per step, so that DDP sees one forward."""
        prototypes = self.head.matrices()
        with shared_gradients():
            return [self._student(batch, p, prototypes, recompute) for p in passes]

    def _student(
        self, batch: Batch, run: StudentPass, prototypes: list[Tensor], recompute: bool
    ) -> StudentOutput:
        tokens = self.backbone.read(
            batch.crops,
            batch.masks.indices,
            run.subnet,
            masks=[None, batch.masks.mask][-len(batch.crops) :],
            drop=run.drop,
            recompute=recompute,
        )
        _, cls, _ = tokens.split([len(batch.local_crops), len(batch.global_crops), len(batch.masks.indices)])
        return StudentOutput(self.head.embed(tokens), prototypes, cls)

    @torch.no_grad()
    def teacher_logits(self, batch: Batch, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of the class tokens, views swapped so that A teaches B, and of the masked patches.

        They are products of operands in `dtype`, and kept in it.
        """
        count, masked = len(batch.global_crops), len(batch.masks.indices)
        tokens = self.backbone.read([batch.global_crops], batch.masks.indices)
        *views, patches = tokens.split([*[count // VIEWS] * VIEWS, masked])
        embedded = self.head.embed(torch.cat([*views[::-1], patches]))
        with without_autocast(tokens.device):
            logits = [
                F.linear(x.to(dtype), w.to(dtype)).split([count, masked])
                for x, w in zip(embedded, self.head.matrices(), strict=True)
            ]
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
    teacher: Network, batches: Sequence[Batch], temperature: float, config: LossConfig, centers: Centers
) -> list[Targets]:
    """Targets of this process's chunks of a step, over all chunks of all processes.

    With centering, the centers are those before this step and then move. Sinkhorn, with its reductions over
    processes, runs beside what follows.
    """
    logits = [teacher.teacher_logits(batch, OPERANDS[config.operands]) for batch in batches]
    kinds = [[_rows(parts) for parts in zip(*kind, strict=True)] for kind in zip(*logits, strict=True)]
    cls, patches = kinds
    sizes = [[len(chunk[kind][0]) for chunk in logits] for kind in range(2)]
    stream = None
    if config.targets == "sinkhorn":
        stream = side_stream(batches[0].global_crops.device, "targets")
        with beside(stream):
            both = losses.sinkhorn([*cls, *patches], temperature)
    else:
        both = losses.centered([*cls, *patches], [*centers.cls, *centers.patches], temperature)
        equal = config.center_weighting == "official"
        for mine, kind, rows in zip((centers.cls, centers.patches), kinds, sizes, strict=True):
            losses.update_centers(mine, kind, config.center_momentum, chunks=rows if equal else None)
    heads = len(cls)
    by_chunk = zip(_split(both[:heads], sizes[0]), _split(both[heads:], sizes[1]), strict=True)
    return [Targets(of_classes, of_patches, stream) for of_classes, of_patches in by_chunk]


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _split(heads: Sequence[SoftTargets], sizes: list[int]) -> Iterator[list[SoftTargets]]:
    """The targets of each chunk, given those of all their rows."""
    for parts in zip(*(head.logits.split(sizes) for head in heads), strict=True):
        yield [replace(head, logits=part) for head, part in zip(heads, parts, strict=True)]


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
    return _loss({"intact": intact, "elastic": elastic}, NAMES, targets, batch, config)


def intact_loss(
    intact: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the intact student."""
    return _loss({"intact": intact}, NAMES[:1], targets, batch, config)


def elastic_loss(
    intact: StudentOutput, elastic: StudentOutput, targets: Targets, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of `tribranch_loss` that train the elastic student; no gradient reaches the intact one."""
    return _loss({"intact": intact.detached(), "elastic": elastic}, NAMES[1:], targets, batch, config)


def _loss(
    students: dict[str, StudentOutput],
    learn: Sequence[str],
    targets: Targets,
    batch: Batch,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summands of the loss for the students that `learn`, and their terms."""
    join(targets.stream)
    learners = [students[name] for name in learn]
    heads, rows = range(len(targets.cls)), _TargetRows.of(batch)
    by_head = [_cross_entropies(head, students, learn, targets, rows, config) for head in heads]
    classes, patches = (
        {name: torch.stack([head[kind][name] for head in by_head]) for name in by_head[0][kind]}
        for kind in range(2)
    )
    terms: dict[str, Tensor] = {}  # `[heads]` each
    weighted = torch.zeros(len(heads), device=learners[0].tokens.device)
    for name in learn:
        terms[f"{name}.dino"] = _dino(classes[name], batch)
        terms[f"{name}.ibot"] = _ibot(patches[name], batch.masks)
        share = config.intact if name == "intact" else 1 - config.intact
        sums = config.dino * terms[f"{name}.dino"] + config.ibot * terms[f"{name}.ibot"]
        weighted = weighted + share * sums
    if "elastic" in learn:
        terms["elastic.distill"] = _distill(classes["distilled"], batch)
        weighted = weighted + (1 - config.intact) * terms["elastic.distill"]
    total = weighted.mean()
    found = {f"{name}.{head}": term.detach()[head] for head in heads for name, term in terms.items()}
    if config.koleo:
        views = [view for student in learners for view in student.tokens.chunk(VIEWS)]
        koleo = sum((losses.koleo(view) for view in views), total.new_zeros(())) / 2
        found["koleo"] = koleo.detach()
        total = total + config.koleo * koleo
    return total, found


@dataclass(frozen=True)
class _TargetRows:
    """Which targets each row of a student learns from, `[rows, 2]`, -1 for none.

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
        both = torch.arange(VIEWS * images, device=device).view(VIEWS, images).t()
        return cls(
            torch.cat([both.repeat(batch.local_views, 1), _own(VIEWS * images, device)]),
            _own(len(batch.masks.indices), device),
        )


def _own(rows: int, device: torch.device) -> Tensor:
    own = torch.arange(rows, device=device)
    return torch.stack([own, torch.full_like(own, -1)], dim=1)


def _cross_entropies(
    head: int,
    students: dict[str, StudentOutput],
    learn: Sequence[str],
    targets: Targets,
    rows: _TargetRows,
    config: LossConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses `[rows]` of a head, of class tokens and of masked patches: of each student, and distillation."""
    count = len(rows.classes)
    features = [student.features[head] for student in students.values()]
    prototypes = students[learn[-1]].prototypes[head]

    def losses_of(part: slice, target: SoftTargets, index: Tensor) -> dict[str, Tensor]:
        found = prototype_cross_entropy(
            [x[part] for x in features], prototypes, target.logits, target.log_scale, index,
            student_temperature=config.student_temperature, teacher_temperature=target.temperature,
            operands=OPERANDS[config.operands],
        )  # fmt: skip
        return dict(zip((*students, "distilled"), found, strict=False))

    with without_autocast(prototypes.device):
        classes = losses_of(slice(count), targets.cls[head], rows.classes)
        return classes, losses_of(slice(count, None), targets.patches[head], rows.patches)


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
