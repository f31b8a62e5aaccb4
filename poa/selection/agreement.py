"""How good subnets are without labels: agreement of their features with the intact network's.

CKA     ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features X, Y: 1 where they are the same up to rotation
        and scale. Linear CKA, Kornblith et al., ICML 2019.
RankMe  exp(entropy of the normalised singular values) of features: how many dimensions they use.
        Garrido et al., ICML 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poa.backbones import Backbone
from poa.config import Config
from poa.data.sources import ImageSource
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate.features import extract_features
from poa.evaluate.knn import class_token
from poa.evaluate.quality import rankme
from poa.subnets import Subnet


@dataclass(frozen=True)
class Agreement:
    """Of a subnet: linear CKA with the intact network, in 0..1; RankMe, at least 1."""

    cka: float
    rankme: float


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features `[images, channels_x]` and `[images, channels_y]`, float64 inside."""
    x, y = ((z - z.mean(0)).double() for z in (x, y))
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(y.T @ x) ** 2 / norms) if norms > 0 else 0.0


def agreements(
    backbone: Backbone, subnets: Sequence[Subnet], source: ImageSource, config: Config, world: World
) -> list[Agreement]:
    """Agreement of subnets with the intact network on the class tokens of images; `world` is the only
    process. Raises InputError: fewer than two images can be read."""
    method, workers = config.method, config.performance.workers
    functions = [class_token(backbone, s) for s in [backbone.space.intact, *subnets]]
    extracted = extract_features(
        functions, source, method.crops, world, canvas=method.canvas, workers=workers
    )
    assert extracted is not None
    intact, *others = extracted.features
    if len(intact) < 2:
        raise InputError(f"agreement: expected at least 2 readable images, got {len(intact)}")
    return [Agreement(linear_cka(features, intact), rankme(features)) for features in others]
