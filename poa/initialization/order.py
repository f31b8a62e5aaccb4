"""The order of pretrained parts by importance, and the Taylor scores that it follows.

A subnet is a prefix, so what comes first should matter most. Sorting changes nothing that the intact network
computes. Scores are first-order Taylor expansions: imagine a gate on a part; its gradient is the sum of
weight times gradient over the weights that read or write the part, and tells how the output changes where the
part is removed. With random vectors v, the mean square of the gate's gradient of <v, features> is the mean
squared change of the features. No labels are needed.

Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, with <v, features> for
the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from poa.backbones import Backbone
from poa.network import Network


class Order(ABC):
    """Parts of a kind of backbone, the most important first; subclasses are dataclasses of lists.

    Attributes:
        blocks: as `method.backbone.block_order`.
    """

    blocks: list[int]

    @classmethod
    @abstractmethod
    def of_scores(cls, backbone: Any, scores: dict[str, Tensor]) -> Order:
        """That of the scores of parts, the highest first."""

    @staticmethod
    @abstractmethod
    def gates(backbone: Any, products: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the gates of all parts, of weights times gradients by parameter."""

    @abstractmethod
    def sort_weights(self, backbone: Any) -> None:
        """Put the weights of a backbone into this order, in place."""

    @abstractmethod
    def sort_projections(self, network: Network) -> None:
        """Put what projection heads read into the order of the features."""

    @classmethod
    def taylor(cls, backbone: Backbone, batches: Iterable[Tensor], generator: torch.Generator) -> Order:
        """By Taylor scores.

        Args:
            backbone: pretrained.
            batches: normalised images `[B, C, S, S]` on its device.
            generator: on the CPU, of the random vectors.
        """
        scores: dict[str, Tensor] = {}
        for images in batches:
            for name, gates in cls.gates(backbone, _products(backbone, images, generator)).items():
                scores[name] = scores.get(name, 0.0) + gates.square()
        return cls.of_scores(backbone, scores)

    @classmethod
    @torch.no_grad()
    def random(cls, backbone: Backbone, generator: torch.Generator) -> Order:
        """With nothing known of importance."""
        gates = cls.gates(backbone, dict(backbone.named_parameters()))
        scores = {name: torch.rand(gate.shape, generator=generator) for name, gate in gates.items()}
        return cls.of_scores(backbone, scores)

    @torch.no_grad()
    def applied(self, backbone: Backbone) -> Backbone:
        """The same network in this order, and of the same features but for their order."""
        config = backbone.config.changed(block_order=tuple(self.blocks))
        result = config.build().to(next(backbone.parameters()).device)
        result.load_state_dict(backbone.state_dict())
        self.sort_weights(result)
        return result.eval()

    def sort(self, network: Network) -> None:
        """Put a backbone, and what its heads read, into this order."""
        network.backbone = self.applied(network.backbone)
        self.sort_projections(network)


def _products(backbone: Backbone, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights times gradients of the sum over images of <v, features>, by parameter."""
    (features,) = backbone([images])
    probed = torch.cat([features.cls, features.patches.mean(1)], dim=1)
    probe = torch.randn(probed.shape, generator=generator).to(probed)
    weights = dict(backbone.named_parameters())
    gradients = torch.autograd.grad((probed * probe).sum(), list(weights.values()), allow_unused=True)
    pairs = zip(weights.items(), gradients, strict=True)
    return {name: weight.detach() * grad for (name, weight), grad in pairs if grad is not None}


def ranked(scores: Tensor) -> Any:
    """Positions of the highest scores first, along the last dimension, as lists."""
    return scores.argsort(dim=-1, descending=True, stable=True).tolist()
