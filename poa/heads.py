"""Projection heads: independent MLPs onto weight-normalised prototypes.

Each head has its own MLP; only its first layer is elastic. A row goes through MLP, L2 normalisation and the
product with unit prototypes times a trainable gain.

Source: POA (Zhang et al., ECCV 2024), section 3.4; official `MDINOHead`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kernels import elastic_head_mlps, unit_rows, without_autocast
from poa.options import Options, option


@dataclass(frozen=True)
class HeadConfig(Options, at="method.head"):
    """The projection heads."""

    prototypes: tuple[int, ...] = option((8192, 16384, 32768, 65536), "prototypes per head", "[2, 16777216]")
    hidden: int = option(2048, "hidden units of a head's MLP", "[1, 65536]")
    bottleneck: int = option(256, "output channels of a head's MLP, compared with prototypes", "[1, 65536]")
    layers: int = option(3, "linear layers of a head's MLP", "[1, 64]")

    def check(self) -> None:
        if not 1 <= len(self.prototypes) <= 64:
            raise self.wrong("prototypes", "1 to 64 heads")

    def sizes(self, width: int) -> list[int]:
        """Channels between the layers of a head's MLP, from those of the intact backbone on."""
        return [width] + [self.hidden] * (self.layers - 1) + [self.bottleneck]

    def parameters(self, width: int) -> int:
        """Parameters of all heads, for features of so many channels."""
        sizes = self.sizes(width)
        mlp = sum(a * b + b for a, b in zip(sizes, sizes[1:], strict=False))
        return len(self.prototypes) * mlp + sum(self.prototypes) * (self.bottleneck + 1)


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are unit vectors times a trainable gain."""

    def __init__(self, features: int, count: int, generator: torch.Generator | None = None):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, features))
        bound = features**-0.5
        with torch.no_grad():
            self.weight_v.uniform_(-bound, bound, generator=generator)

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """The prototypes `[count, features]` as they multiply features, in their own dtype or another."""
        return unit_rows(self.weight_v, self.weight_g, dtype=dtype)


class ProjectionHead(nn.Module):
    """One head: elastic MLP, normalisation, prototypes."""

    def __init__(
        self, max_width: int, config: HeadConfig, prototypes: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        sizes = config.sizes(max_width)
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
            nn.init.zeros_(layer.bias)
        self.first = layers[0]
        self.rest = nn.ModuleList(layers[1:])
        self.prototypes = Prototypes(config.bottleneck, prototypes, generator)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of the MLP."""
        layers = [self.first, *cast("list[nn.Linear]", list(self.rest))]
        return [(layer.weight, layer.bias) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[rows, w]` -> logits `[rows, prototypes]`, float32."""
        (y,) = elastic_head_mlps(x, [self.layers])
        with without_autocast(x.device):
            weight = self.prototypes.matrix()
            return F.linear(unit_rows(y, dtype=weight.dtype), weight)


class ProjectionHeads(nn.Module):
    """All heads side by side, on a backbone whose intact width is `max_width`."""

    def __init__(self, max_width: int, config: HeadConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(
            ProjectionHead(max_width, config, count, generator) for count in config.prototypes
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[rows, w]` -> the logits `[rows, prototypes_i]` of each head."""
        return [head(x) for head in self._heads()]

    def embed(self, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Tokens `[rows, w]` of any width up to the intact one -> unit features `[rows, bottleneck]` of each
        head, in the dtype of its prototypes or another."""
        outputs = elastic_head_mlps(x, [head.layers for head in self._heads()])
        kept = next(self.parameters()).dtype
        return [unit_rows(y, dtype=dtype or kept) for y in outputs]

    def matrices(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The prototypes `[prototypes_i, bottleneck]` of each head."""
        return [head.prototypes.matrix(dtype) for head in self._heads()]

    def _heads(self) -> list[ProjectionHead]:
        return [cast(ProjectionHead, head) for head in self.heads]
