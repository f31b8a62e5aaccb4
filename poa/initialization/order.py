"""The order of pretrained parts by importance, of ViTs and ResNets, and the Taylor scores that it follows.

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
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from elastic_kernels import (
    ElasticBlock,
    ElasticBottleneck,
    sort_channels,
    sort_heads,
    sort_hidden,
    sort_linear,
    sort_middle,
)
from poa.backbones import Backbone, ElasticResNet, ElasticViT
from poa.heads import ProjectionHead
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


@dataclass(frozen=True)
class ViTOrder(Order):
    """Of a ViT.

    Attributes:
        channels: of the residual stream.
        heads, hidden: of each block.
        blocks: as `method.backbone.block_order`.
    """

    channels: list[int]
    heads: list[list[int]]
    hidden: list[list[int]]
    blocks: list[int]

    @classmethod
    def of_scores(cls, backbone: ElasticViT, scores: dict[str, Tensor]) -> ViTOrder:
        return cls(**{name: ranked(scores[name]) for name in ("channels", "heads", "hidden", "blocks")})

    @staticmethod
    def gates(backbone: ElasticViT, products: dict[str, Tensor]) -> dict[str, Tensor]:
        """`[w]` of channels, `[blocks, heads]`, `[blocks, hidden]`, `[blocks]`."""

        def of_blocks(part: str) -> Tensor:
            return torch.stack([products[f"blocks.{index}.{part}"] for index in range(len(backbone.blocks))])

        scales = of_blocks("ls1.gamma") + of_blocks("ls2.gamma")
        embedding = products["patch_embed.proj.weight"].sum((1, 2, 3)) + products["patch_embed.proj.bias"]
        tokens = (products[name] for name in ("cls_token", "reg_token", "pos_embed") if name in products)
        return {
            "channels": scales.sum(0) + embedding + sum(token.sum((0, 1)) for token in tokens),
            "heads": of_blocks("attn.proj.weight").sum(1).unflatten(1, (-1, backbone.config.head_dim)).sum(2),
            "hidden": of_blocks("mlp.fc2.weight").sum(1),
            "blocks": scales.sum(1),
        }

    def sort_weights(self, backbone: ElasticViT) -> None:
        channels = torch.tensor(self.channels)
        for token in (backbone.cls_token, backbone.reg_token, backbone.pos_embed, backbone.mask_token):
            if token is not None:
                token.copy_(token[..., channels.to(token.device)])
        for module in (backbone.patch_embed, *backbone.blocks, backbone.norm):
            sort_channels(module, channels)
        for block, heads, hidden in zip(backbone.blocks, self.heads, self.hidden, strict=True):
            sort_heads(cast(ElasticBlock, block).attn, torch.tensor(heads))
            sort_hidden(cast(ElasticBlock, block).mlp, torch.tensor(hidden))

    def sort_projections(self, network: Network) -> None:
        for head in network.head.heads:
            sort_linear(cast(ProjectionHead, head).first, inputs=torch.tensor(self.channels))


@dataclass(frozen=True)
class ResNetOrder(Order):
    """Of a ResNet with group norm.

    Groups of a norm change places as a whole, by the sum of their channels' scores, and channels within
    them: so the intact network computes the same. The first block of a stage, which changes the shape of the
    maps, stays the first.

    Attributes:
        first, second: of each block, channels before and after the 3x3 convolution.
        blocks: as `method.backbone.block_order`.
    """

    first: list[list[int]]
    second: list[list[int]]
    blocks: list[int]

    @classmethod
    def of_scores(cls, backbone: ElasticResNet, scores: dict[str, Tensor]) -> ResNetOrder:
        groups, names = backbone.config.norm_groups, list(_bottlenecks(backbone))
        first, second = (
            [_ranked_in_groups(scores[f"{name}.{part}"], groups) for name in names]
            for part in ("first", "second")
        )
        blocks: list[int] = []
        for stage in range(len(backbone.config.max_depths)):
            influence = scores[f"layer{stage + 1}"]
            influence[0] = torch.inf
            blocks += ranked(influence)
        return cls(first, second, blocks)

    @staticmethod
    def gates(backbone: ElasticResNet, products: dict[str, Tensor]) -> dict[str, Tensor]:
        """`[middle]` before and after the 3x3 convolution of each block, `[blocks]` of each stage."""
        gates, influences = dict[str, Tensor](), dict[str, list[Tensor]]()
        for name in _bottlenecks(backbone):
            gates[f"{name}.first"] = products[f"{name}.conv2.weight"].sum((0, 2, 3))
            gates[f"{name}.second"] = products[f"{name}.conv3.weight"].sum(0)
            branch = products[f"{name}.norm3.weight"].sum() + products[f"{name}.norm3.bias"].sum()
            influences.setdefault(name.partition(".")[0], []).append(branch)
        return gates | {stage: torch.stack(of_blocks) for stage, of_blocks in influences.items()}

    def sort_weights(self, backbone: ElasticResNet) -> None:
        blocks = _bottlenecks(backbone).values()
        for block, first, second in zip(blocks, self.first, self.second, strict=True):
            sort_middle(block, torch.tensor(first), torch.tensor(second))

    def sort_projections(self, network: Network) -> None:
        """Features keep their order."""


def _bottlenecks(resnet: ElasticResNet) -> dict[str, ElasticBottleneck]:
    """All blocks by name, in order."""
    return {name: module for name, module in resnet.named_modules() if isinstance(module, ElasticBottleneck)}


def _ranked_in_groups(scores: Tensor, groups: int) -> list[int]:
    """Channels `[groups * size]` by score, those of a group beside each other."""
    grouped = scores.view(groups, -1)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    channels = within + grouped.shape[1] * torch.arange(groups, device=scores.device).unsqueeze(1)
    order: list[int] = channels[ranked(grouped.sum(1))].flatten().tolist()
    return order


ORDERS: dict[str, type[Order]] = {"vit": ViTOrder, "resnet": ResNetOrder}
"""By kind of backbone."""


def random_order(backbone: Backbone, generator: torch.Generator) -> Order:
    return ORDERS[backbone.config.kind].random(backbone, generator)
