"""What the three branches run: a backbone with its projection heads, on the crops of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kernels import shared_gradients, without_autocast
from poa.backbones import BackboneConfig
from poa.heads import HeadConfig, ProjectionHeads
from poa.loss_rows import LossRows
from poa.masks import Masks
from poa.multicrop import StochasticDepth
from poa.subnets import Subnet

VIEWS = 2  # global crops of an image


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the training device, crops in view-major order (all images of view 0, then of view
    1).

    Attributes:
        global_crops: `[2 B, C, S, S]`.
        local_crops: `[L B, C, s, s]`, L >= 0.
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

    @cached_property
    def loss_rows(self) -> LossRows:
        """What the losses take of each row of a student's features."""
        return LossRows.of(VIEWS, self.local_views, self.masks)


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


class _ReachAll(torch.autograd.Function):
    """The identity, whose backward also reaches parameters, with no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return dx, *(None,) * ctx.count


def reaching_all(loss: Tensor, network: nn.Module) -> Tensor:
    """The loss, whose backward reaches all parameters, as DDP expects; those without a gradient at once, so
    that others are reduced as soon as they are complete."""
    reached: Tensor = _ReachAll.apply(loss, *network.parameters())
    return reached


class _Gathered(torch.autograd.Function):
    """The identity, whose backward adds the gradient that a leaf has gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx + ctx.leaf.grad, None


def gathered(prototypes: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The prototypes, whose backward adds the gradients that an earlier one left in leaves."""
    return [_Gathered.apply(x, leaf) for x, leaf in zip(prototypes, leaves, strict=True)]


class Network(nn.Module):
    """A backbone with its projection heads: the teacher is one, the students share another."""

    def __init__(self, backbone: BackboneConfig, head: HeadConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.backbone = backbone.build(generator)
        self.head = ProjectionHeads(backbone.feature_width(backbone.space.intact), head, generator)

    def forward(
        self,
        batch: Batch,
        passes: Sequence[StudentPass],
        recompute: bool = False,
        prototypes: list[Tensor] | None = None,
    ) -> list[StudentOutput]:
        """Run the students, one pass each, of whose losses `backward` is called.

        Blocks are perhaps recomputed then. The prototypes of each head may be made already.
        """
        prototypes = self.head.matrices() if prototypes is None else prototypes
        with shared_gradients(accumulate=True):
            return [self._student(batch, p, prototypes, recompute) for p in passes]

    def _student(
        self, batch: Batch, run: StudentPass, prototypes: list[Tensor], recompute: bool
    ) -> StudentOutput:
        tokens = self.backbone.gather_tokens(
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
    def teacher_logits(self, batch: Batch, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Logits of the class tokens, views swapped so that A teaches B, and of the masked patches.

        They are products of operands in `dtype`, and kept in it. Last the class tokens, views as they are.
        """
        count, masked = len(batch.global_crops), len(batch.masks.indices)
        tokens = self.backbone.gather_tokens([batch.global_crops], batch.masks.indices)
        *views, patches = tokens.split([*[count // VIEWS] * VIEWS, masked])
        embedded = self.head.embed(torch.cat([*views[::-1], patches]), dtype)
        with without_autocast(tokens.device):
            logits = [
                F.linear(x, w).split([count, masked])
                for x, w in zip(embedded, self.head.matrices(dtype), strict=True)
            ]
        return [c for c, _ in logits], [p for _, p in logits], tokens[:count]
