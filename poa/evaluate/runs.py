"""The evaluation of a run: its images, its checkpoint and its files, in all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from poa.backbones.base import Backbone
from poa.checkpoint import Checkpoint
from poa.classifier import Classifier
from poa.config import Config
from poa.data.layout import Openers
from poa.distributed import World, init_distributed
from poa.drawing import require_drawable
from poa.errors import InputError
from poa.evaluate.scores import Report
from poa.evaluate.suite import require_protocols
from poa.evaluate.sweep import Origin, evaluate_subnets, evaluation_file
from poa.evaluate.top1 import require_classes, top1_of
from poa.files import require_json
from poa.images import open_on_ranks
from poa.initialization.order import ORDERS
from poa.network import Network
from poa.progress import say
from poa.selection.quality import Weights
from poa.step import initial_network


def evaluate_run(
    weights: Weights,
    config: Config,
    openers: Openers | None,
    subnets: Sequence[str],
    protocols: Sequence[str],
    folders: Mapping[str, Any],
    *,
    initial: bool,
    baselines: bool,
    out: Path | None,
    plot: Path | None,
) -> Report:
    """Score subnets of a run and write the scores; the arguments are those of `Run.evaluate`.

    `config` has the images to score on, and the device; `openers` open those that have no name.
    """
    folder = weights.folder
    chosen, asked = config.method.backbone.space.named(subnets), require_protocols(protocols)
    with init_distributed(config.run.device, config.run.timeout, config.performance.threads) as world:
        network, checkpoint = _same_network(weights, world)
        out = out or evaluation_file(folder.path, config.data.source, weights.branch, checkpoint.step)
        world.from_main(partial(require_outputs, out, plot))
        images = open_on_ranks(config, world, openers)
        backbone = network.to(world.device).backbone
        if isinstance(network, Classifier):
            require_classes(network.classes, images, config.data.source)
            asked = [top1_of(network), *asked]
            if initial:
                raise InputError("--initial: expected a run of pre-training with it, got a fine-tuned one")
        for report in evaluate_subnets(
            backbone,
            chosen,
            images,
            config,
            world,
            Origin.of(folder, checkpoint, weights.branch),
            initial=_untrained(weights, config, world) if initial else None,
            protocols=asked,
            folders=folders,
            baselines=baselines,
        ):
            if world.is_main:
                report.write(out)
        if world.is_main:
            if images.left_out:
                say(f"left out: {images.left_out}")
            if plot:
                report.plot(plot)
    return replace(report, files=tuple(file for file in (out, plot) if file))


def _untrained(weights: Weights, config: Config, world: World) -> Backbone:
    """The backbone before training, in the order of the run's channels."""
    network = initial_network(config, weights.branch)
    if order := weights.folder.order():
        ORDERS[config.method.backbone.kind](**order).sort(network)
    return network.backbone.to(world.device)


def _same_network(weights: Weights, world: World) -> tuple[Network | Classifier, Checkpoint]:
    """The same network in all processes, also where a run is saving newer ones meanwhile."""
    while True:
        network, checkpoint = weights.folder.network(weights.branch, weights.step)
        if len(set(world.gather(checkpoint.step))) == 1:
            return network, checkpoint


def require_outputs(out: Path, plot: Path | None, key: str = "settings") -> None:
    """Raise InputError where scores cannot be written to a JSON file with such a key, or a plot."""
    require_json(out, "--out", key)
    if plot:
        require_drawable(plot, "--plot")
