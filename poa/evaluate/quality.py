"""How good features are without labels: their spectrum, and whether views of an image stay together.

RankMe      exp(entropy of the normalised singular values): how many dimensions features use.
            Garrido et al., ICML 2023.
alpha-ReQ   exponent of the power law of the eigenvalues of the covariance, fitted to all of them in
            logarithms; good features are near 1. Agrawal et al., NeurIPS 2022.
LiDAR       as RankMe, of the eigenvalues of `Sw^-1/2 Sb Sw^-1/2`, where an image is a class and its
            views are the samples: how many dimensions tell images apart. Thilak et al., ICLR 2024; here
            with four views that are not drawn: the image, its mirror image, two corners of 3/4 the side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.evaluate.protocol import Function, Protocol
from poa.subnets import Subnet

EPS = 1e-7  # of RankMe
RIDGE = 1e-4  # of LiDAR's within-image scatter, relative to its mean eigenvalue
VIEWS = 4
TITLES = {"rankme": "RankMe", "alpha_req": "alpha-ReQ", "lidar": "LiDAR"}


def effective_rank(values: Tensor) -> float:
    """exp(entropy) of non-negative values over their sum."""
    shares = values / values.sum().clamp_min(EPS) + EPS
    return float(torch.special.entr(shares).sum().exp())


def rankme(features: Tensor) -> float:
    """Effective rank of features `[images, channels]`, float64 inside; 0 where they are not finite."""
    return effective_rank(torch.linalg.svdvals(features.double())) if features.isfinite().all() else 0.0


def alpha_req(features: Tensor) -> float:
    """Exponent of the decay of the eigenvalues of the covariance of `[images, channels]`, float64 inside."""
    x = features.double()
    values = torch.linalg.svdvals(x - x.mean(0)) ** 2
    values = values[values > values.max() * 1e-10]
    if len(values) < 2:
        return 0.0
    ranks = torch.arange(1, len(values) + 1, dtype=torch.float64).log()
    ranks, logs = ranks - ranks.mean(), values.log()
    return float(-(ranks * (logs - logs.mean())).sum() / (ranks**2).sum())


def lidar(views: Tensor) -> float:
    """Effective rank of what tells images apart, of views `[images, views, channels]`, float64 inside."""
    x = views.double()
    means = x.mean(1)
    within = (x - means[:, None]).flatten(0, 1)
    between = means - means.mean(0)
    scatter = within.t() @ within / len(within)
    ridge = RIDGE * scatter.diagonal().mean().clamp_min(1e-12)
    values, vectors = torch.linalg.eigh(scatter + ridge * torch.eye(len(scatter), dtype=torch.float64))
    whitened = between @ (vectors / values.sqrt())
    return effective_rank(torch.linalg.svdvals(whitened) ** 2)


def views_of(images: Tensor) -> list[Tensor]:
    """Four views `[B, C, S, S]` of normalised images."""
    size, side = images.shape[-1], round(0.75 * images.shape[-1])
    corners = (images[..., :side, :side], images[..., -side:, -side:])
    resized = [
        F.interpolate(c, (size, size), mode="bicubic", align_corners=False, antialias=True) for c in corners
    ]
    return [images, images.flip(-1), *resized]


def tokens_of_views(backbone: Backbone, subnet: Subnet) -> Function:
    """Class tokens `[B, views, width]`."""
    return lambda images: torch.stack(
        [backbone([view], subnet)[0].cls.float() for view in views_of(images)], 1
    )


def quality(views: Tensor) -> dict[str, float]:
    """RankMe and alpha-ReQ of the first view, LiDAR of all, of class tokens `[images, views, channels]`; 0
    where some are not finite."""
    if not views.isfinite().all():
        return dict.fromkeys(TITLES, 0.0)
    return {"rankme": rankme(views[:, 0]), "alpha_req": alpha_req(views[:, 0]), "lidar": lidar(views)}


def _ranks(values: list[float]) -> Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    return (x[:, None] > x).sum(1) + (x[:, None] == x).double().sum(1) / 2


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists; ties have the mean of their ranks; 0 where one is constant."""
    x, y = (ranks - ranks.mean() for ranks in map(_ranks, (a, b)))
    return float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-12))


QUALITY = Protocol(
    "quality",
    "also measure features without labels: RankMe, alpha-ReQ and a LiDAR of four views",
    tokens_of_views,
    lambda train, queries, device, seed: quality(queries.features),
    lambda score: {title: score[name] for name, title in TITLES.items()},
    TITLES["rankme"],
    {
        "protocol": "label-free: effective rank, spectral decay and separation of views of class tokens",
        "views": VIEWS,
    },
    learns=False,
    numbers=tuple(TITLES.values()),
)
