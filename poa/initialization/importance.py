"""Pretrained channels, heads, hidden units and blocks in the order of their importance.

A subnet is a prefix, so what comes first should matter most. Sorting changes nothing that the intact network
computes. Scores are first-order Taylor expansions: imagine a gate on a part; its gradient is the sum of
weight times gradient over the weights that write the part, and tells how the output changes where the part
is removed. With random vectors v, the mean square of the gate's gradient of <v, features> is the mean squared
change of the features. No labels are needed.

Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, with <v, features> for
the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from elastic_kernels import ElasticBlock, sort_channels, sort_heads, sort_hidden, sort_linear
from poa.backbones import ElasticViT
from poa.config import Config
from poa.data.loader import evaluation_batches
from poa.data.preprocessing import Preprocessing
from poa.data.sources import DataSplit
from poa.distributed import World
from poa.evaluate import REPORTED_K, knn_of_subnets
from poa.evaluate.sweep import limited
from poa.heads import ProjectionHead
from poa.network import Network
from poa.progress import say
from poa.random import torch_stream
from poa.step import Initial
from poa.subnets import Subnet

BATCH = 4  # images of a gradient; more gradients make better means of their squares


@dataclass(frozen=True)
class Order:
    """The most important first.

    Attributes:
        channels: of the residual stream.
        heads, hidden: of each block.
        blocks: which subnets keep, see `method.backbone.block_order`.
    """

    channels: list[int]
    heads: list[list[int]]
    hidden: list[list[int]]
    blocks: list[int]

    @classmethod
    def random(cls, vit: ElasticViT, generator: torch.Generator) -> Order:
        """With nothing known of importance."""

        def shuffled(count: int) -> list[int]:
            return torch.randperm(count, generator=generator).tolist()

        config = vit.config
        heads = [shuffled(config.max_width // config.head_dim) for _ in vit.blocks]
        hidden = [shuffled(config.hidden) for _ in vit.blocks]
        return cls(shuffled(config.max_width), heads, hidden, shuffled(config.max_depth))

    def sort(self, network: Network) -> None:
        """Put a backbone, and what its heads read, into this order."""
        network.backbone = self.applied(cast(ElasticViT, network.backbone))
        for head in network.head.heads:
            sort_linear(cast(ProjectionHead, head).first, inputs=torch.tensor(self.channels))

    @torch.no_grad()
    def applied(self, vit: ElasticViT) -> ElasticViT:
        """The same network in this order, and of the same features but for their order."""
        config = replace(vit.config, block_order=tuple(self.blocks))
        result, channels = config.build().to(vit.cls_token.device), torch.tensor(self.channels)
        result.load_state_dict(vit.state_dict())
        for token in (result.cls_token, result.reg_token, result.pos_embed, result.mask_token):
            if token is not None:
                token.copy_(token[..., channels.to(token.device)])
        for module in (result.patch_embed, *result.blocks, result.norm):
            sort_channels(module, channels)
        for block, heads, hidden in zip(result.blocks, self.heads, self.hidden, strict=True):
            sort_heads(cast(ElasticBlock, block).attn, torch.tensor(heads))
            sort_hidden(cast(ElasticBlock, block).mlp, torch.tensor(hidden))
        return result.eval()


def taylor_order(vit: ElasticViT, batches: Iterable[Tensor], generator: torch.Generator) -> Order:
    """The order by Taylor scores.

    Args:
        vit: pretrained.
        batches: normalised images `[B, C, S, S]` on its device.
        generator: on the CPU, of the random vectors.
    """
    sums: dict[str, Tensor] = {}
    for images in batches:
        for name, gates in _gate_gradients(vit, images, generator).items():
            sums[name] = sums.get(name, 0.0) + gates.square()

    def ranked(name: str) -> Any:
        return sums[name].argsort(dim=-1, descending=True, stable=True).tolist()

    return Order(*(ranked(name) for name in ("channels", "heads", "hidden", "blocks")))


def _gate_gradients(vit: ElasticViT, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Of the sum over images of <v, features>, for gates of all parts: `[w]`, `[blocks, heads]`, ..."""
    (features,) = vit([images])
    probed = torch.cat([features.cls, features.patches.mean(1)], dim=1)
    probe = torch.randn(probed.shape, generator=generator).to(probed)
    weights = dict(vit.named_parameters())
    gradients = torch.autograd.grad((probed * probe).sum(), list(weights.values()), allow_unused=True)
    pairs = zip(weights.items(), gradients, strict=True)
    gates = {name: weight.detach() * grad for (name, weight), grad in pairs if grad is not None}

    def of_blocks(part: str) -> Tensor:
        return torch.stack([gates[f"blocks.{index}.{part}"] for index in range(len(vit.blocks))])

    scales = of_blocks("ls1.gamma") + of_blocks("ls2.gamma")
    embedding = gates["patch_embed.proj.weight"].sum((1, 2, 3)) + gates["patch_embed.proj.bias"]
    tokens = (gates[name] for name in ("cls_token", "reg_token", "pos_embed") if name in gates)
    return {
        "channels": scales.sum(0) + embedding + sum(token.sum((0, 1)) for token in tokens),
        "heads": of_blocks("attn.proj.weight").sum(1).unflatten(1, (-1, vit.config.head_dim)).sum(2),
        "hidden": of_blocks("mlp.fc2.weight").sum(1),
        "blocks": scales.sum(1),
    }


def sort_by_importance(
    config: Config, initial: Initial, data: DataSplit, world: World
) -> tuple[Config, Order]:
    """Sort the networks of a new run in place, and say what that is worth.

    Returns:
        The configuration with the order of the blocks, and the whole order, the same on all ranks.
    """
    method, before = config.method, cast(ElasticViT, initial.teacher.backbone).to(world.device)
    crops, canvas, workers = method.crops, method.canvas, config.performance.workers

    def scored() -> Order:
        preprocessing, images = Preprocessing.of(crops, canvas), limited(data.train, method.init.images)
        decoded = evaluation_batches(images, canvas, workers, batch_size=BATCH)
        batches = (preprocessing.crop(b.images.to(world.device), b.sizes) for b in decoded if len(b.images))
        return taylor_order(before, batches, torch_stream(method.seed, "importance"))

    order = world.from_main(scored)
    for network in (initial.student, initial.teacher):
        order.sort(network)
    backbone = cast(ElasticViT, initial.teacher.backbone)
    if data.test and config.run.evaluate_every:
        for line in _compared(before, backbone, config, data, world):
            if world.is_main:
                say(line)
    return replace(config, method=replace(method, backbone=backbone.config)), order


def _compared(
    vit: ElasticViT, sorted_vit: ElasticViT, config: Config, data: DataSplit, world: World
) -> list[str]:
    """k-NN accuracy of subnets before training, in this and in a random order."""
    space = vit.space
    (low,), (high,) = space.smallest.blocks, space.intact.blocks
    corners = [(space.smallest.width, low), (space.smallest.width, high), (space.intact.width, low)]
    subnets = list(dict.fromkeys(Subnet(*corner) for corner in corners))
    shuffled = Order.random(vit, torch_stream(config.method.seed, "random order")).applied(vit)
    tables = [
        knn_of_subnets(network, subnets, data, config, world, config.run.knn_images)
        for network in (sorted_vit, shuffled)
    ]
    return [
        f"importance: {REPORTED_K}-NN accuracy of {subnet}: {ours[REPORTED_K]:.1%}, "
        f"{theirs[REPORTED_K]:.1%} in a random order"
        for subnet, ours, theirs in zip(subnets, *tables, strict=True)
    ]
