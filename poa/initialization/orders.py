"""What is sorted of each kind of backbone: parts of a ViT, and of a ResNet with group norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

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
from poa.initialization.order import Order, ranked
from poa.network import Network


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
