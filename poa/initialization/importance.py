"""Sorting the pretrained weights of a new run by importance, and saying what that is worth."""

from __future__ import annotations

from dataclasses import replace

from poa.backbones import Backbone
from poa.config import Config
from poa.data.loader import evaluation_batches
from poa.data.preprocessing import Preprocessing
from poa.data.sources import DataSplit
from poa.distributed import World
from poa.evaluate import REPORTED_K, knn_of_subnets
from poa.evaluate.sweep import limited
from poa.initialization.order import ORDERS, Order, random_order
from poa.progress import say
from poa.random import torch_stream
from poa.step import Initial
from poa.subnets import Subnet

BATCH = 4  # images of a gradient; more gradients make better means of their squares


def sort_by_importance(
    config: Config, initial: Initial, data: DataSplit, world: World
) -> tuple[Config, Order]:
    """Sort the networks of a new run in place, and say what that is worth.

    Returns:
        The configuration with the order of the blocks, and the whole order, the same on all ranks.
    """
    method, before = config.method, initial.teacher.backbone.to(world.device)
    crops, canvas, workers = method.crops, method.canvas, config.performance.workers

    def scored() -> Order:
        preprocessing, images = Preprocessing.of(crops, canvas), limited(data.train, method.init.images)
        decoded = evaluation_batches(images, canvas, workers, batch_size=BATCH)
        batches = (preprocessing.crop(b.images.to(world.device), b.sizes) for b in decoded if len(b.images))
        kind = ORDERS[method.backbone.kind]
        return kind.taylor(before, batches, torch_stream(method.seed, "importance"))

    order = world.from_main(scored)
    for network in (initial.student, initial.teacher):
        order.sort(network)
    backbone = initial.teacher.backbone
    if data.test and config.run.evaluate_every:
        for line in _compared(before, backbone, config, data, world):
            if world.is_main:
                say(line)
    in_order = method.backbone.changed(block_order=tuple(order.blocks))
    return replace(config, method=replace(method, backbone=in_order)), order


def _compared(
    before: Backbone, backbone: Backbone, config: Config, data: DataSplit, world: World
) -> list[str]:
    """k-NN accuracy of subnets before training, in this and in a random order."""
    low, high = backbone.space.smallest, backbone.space.intact
    corners = [low, Subnet(low.width, high.depth), Subnet(high.width, low.depth)]
    subnets = list(dict.fromkeys(corners))
    shuffled = random_order(before, torch_stream(config.method.seed, "random order")).applied(before)
    tables = [
        knn_of_subnets(network, subnets, data, config, world, config.run.knn_images)
        for network in (backbone, shuffled)
    ]
    return [
        f"importance: {REPORTED_K}-NN accuracy of {subnet}: {ours[REPORTED_K]:.1%}, "
        f"{theirs[REPORTED_K]:.1%} in a random order"
        for subnet, ours, theirs in zip(subnets, *tables, strict=True)
    ]
