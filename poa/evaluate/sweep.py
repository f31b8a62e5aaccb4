"""Accuracies of many subnets: scores, table, JSON and a plot of accuracy against size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poa.backbones import Backbone, BackboneConfig
from poa.checkpoint import Checkpoint, RunFolder, log
from poa.config import Config
from poa.data.sources import DataSplit, ImageSource
from poa.distributed import World
from poa.drawing import write_figure
from poa.errors import InputError
from poa.evaluate.features import (
    MEMORY,
    FeatureSet,
    Function,
    class_token,
    extract_features,
    pixels,
    probe_input,
)
from poa.evaluate.knn import TEMPERATURE, knn_accuracy
from poa.evaluate.linear import LinearScore, linear_accuracy
from poa.evaluate.linear import protocol as linear_protocol
from poa.files import read_json, write_json
from poa.subnets import Subnet
from poa.version import VERSION

REPORTED_K = 20
"""The k that tables and plots show."""


@dataclass(frozen=True)
class Origin:
    """Where evaluated weights come from: the run, its branch and step, and the version of this package."""

    run: str
    branch: str
    step: int
    version: str

    @classmethod
    def of(cls, folder: RunFolder, checkpoint: Checkpoint, branch: str) -> Origin:
        return cls(str(folder.path.absolute()), branch, checkpoint.step, VERSION)


def data_place(name: str) -> str:
    """The same name for the same data, from wherever it is asked."""
    return name if name == "digits" else os.path.abspath(name)


def evaluation_file(folder: RunFolder, data: str, branch: str) -> Path:
    """Where an evaluation goes: `evaluation.json`, or `evaluation-2.json` and so on where that is of other
    data or of another branch."""
    for number in itertools.count(1):
        path = folder.path / (f"evaluation-{number}.json" if number > 1 else "evaluation.json")
        if not path.exists():
            return path
        with suppress(InputError, KeyError, TypeError):
            settings = read_json(path, "evaluation")["settings"]
            if (settings["data"], settings["branch"]) == (data_place(data), branch):
                return path
    raise AssertionError


@dataclass(frozen=True)
class SubnetScore:
    """Size and accuracy of one subnet.

    Attributes:
        subnet, parameters, flops: which, and its size.
        knn: accuracy by k.
        initial: the same before training, if it was asked for.
        linear: linear classifiers, best first, if they were asked for.
    """

    subnet: Subnet
    parameters: int
    flops: int
    knn: dict[int, float]
    initial: dict[int, float] | None = None
    linear: list[LinearScore] | None = None


@dataclass(frozen=True)
class Report:
    """Scores of subnets, with all settings that the numbers depend on."""

    scores: list[SubnetScore]
    settings: dict[str, Any]

    def table(self) -> str:
        """A text table: the settings, then one line per subnet."""
        ks = list(self.scores[0].knn)
        before = "    init" if self.scores[0].initial else ""
        probe = "  linear" if self.scores[0].linear else ""
        s = self.settings
        lines = [
            f"{s['run']}: {s['branch']} of step {s['step']}",
            f"{s['protocol']}, T={s['temperature']}; {s['data']}: {s['bank_images']:,} bank and "
            f"{s['query_images']:,} query images of {s['image_size']} px",
            f"{'subnet':>9} {'params':>11} {'GFLOPs':>8}"
            + "".join(f"  {f'k={k}':>6}" for k in ks)
            + before
            + probe,
        ]
        if max(ks) > s["bank_images"]:
            lines.insert(2, f"a k above {s['bank_images']} counts all images of the bank")
        for score in self.scores:
            line = f"{score.subnet!s:>9} {score.parameters:>11,} {score.flops / 1e9:>8.3f}"
            line += "".join(f"  {score.knn[k]:>6.1%}" for k in ks)
            if score.initial:
                line += f"  {score.initial[REPORTED_K]:>6.1%}"
            if score.linear:
                line += f"  {score.linear[0].accuracy:>6.1%}"
            lines.append(line)
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write JSON."""
        rows = [
            {
                "subnet": str(s.subnet),
                "width": s.subnet.width,
                "depth": s.subnet.depth,
                "params": s.parameters,
                "flops": s.flops,
                "knn": {str(k): v for k, v in s.knn.items()},
                **({"knn_init": {str(k): v for k, v in s.initial.items()}} if s.initial else {}),
                **({"linear": [vars(probe) for probe in s.linear]} if s.linear else {}),
            }
            for s in self.scores
        ]
        write_json(path, {"settings": self.settings, "subnets": rows})

    def plot(self, path: Path, baseline: tuple[str, float] | None = None) -> None:
        """Draw accuracy against parameters, a line per width.

        Args:
            path: of the picture; its ending chooses the format.
            baseline: name and accuracy of a horizontal line.
        """
        plot_scores(self.scores, path, Path(self.settings["data"]).name, baseline)


def evaluate_subnets(
    backbone: Backbone,
    subnets: Sequence[Subnet],
    data: DataSplit,
    config: Config,
    world: World,
    origin: Origin,
    *,
    initial: Backbone | None = None,
    linear: bool = False,
) -> Report:
    """Score subnets on the held-out images with the training images as bank.

    Args:
        backbone: trained weights, on the device of `world`.
        subnets: which networks.
        data: needs labelled test images.
        config: of the run.
        world: this process; all of them extract features.
        origin: of the weights.
        initial: the weights before training, scored too.
        linear: train linear classifiers too.
    """
    after = knn_of_subnets(backbone, subnets, data, config, world)
    before = knn_of_subnets(initial, subnets, data, config, world) if initial else None
    probes = [linear_of_subnet(backbone, s, data, config, world) for s in subnets] if linear else None
    network = config.method.backbone
    scores = [
        SubnetScore(
            subnet,
            network.parameters(subnet),
            network.flops(subnet),
            after[i],
            before[i] if before else None,
            probes[i] if probes else None,
        )
        for i, subnet in enumerate(subnets)
    ]
    return Report(scores, vars(origin) | evaluation_settings(data, config, linear))


def evaluation_settings(data: DataSplit, config: Config, linear: bool) -> dict[str, Any]:
    """What the figures depend on, besides the weights."""
    crops = config.method.crops
    settings = {
        "protocol": "weighted k-NN, cosine similarity, class token",
        "temperature": TEMPERATURE,
        "data": data_place(config.data.source),
        "bank_images": len(data.train.labelled()),
        "query_images": len(data.test or ()),
        "image_size": crops.global_size,
        "resize": crops.eval_resize(),
        "mean": list(crops.mean),
        "std": list(crops.std),
    }
    return settings | ({"linear": linear_protocol()} if linear else {})


def knn_of_subnets(
    backbone: Backbone,
    subnets: Sequence[Subnet],
    data: DataSplit,
    config: Config,
    world: World,
    limit: int | None = None,
) -> list[dict[int, float]]:
    """k-NN accuracy of each subnet by k.

    Images are decoded once for as many subnets as have room for their features at a time.

    Args:
        backbone, subnets, data, config, world: as in `evaluate_subnets`.
        limit: use at most this many bank images and as many queries, spread over the data.
    """
    sources = [_limited(source, limit) for source in _labelled(data)]
    scores: list[dict[int, float]] = []
    for group in _groups(config.method.backbone, subnets, max(len(source) for source in sources)):
        bank, queries = (
            _extract([class_token(backbone, s) for s in group], source, config, world) for source in sources
        )
        scores += world.from_main(partial(_knn_of_group, bank, queries, len(group), world.device))
    return scores


def _knn_of_group(
    bank: FeatureSet | None, queries: FeatureSet | None, count: int, device: torch.device
) -> list[dict[int, float]]:
    """k-NN accuracies of the first `count` features; the main process has them."""
    assert bank is not None and queries is not None
    if unreadable := bank.unreadable + queries.unreadable:
        log.warning("k-NN: %d images could not be read and are left out", unreadable)
    return [_knn(bank, queries, number, device) for number in range(count)]


def _groups(backbone: BackboneConfig, subnets: Sequence[Subnet], images: int) -> Iterator[list[Subnet]]:
    """Neighbours whose float32 features fit into `MEMORY` together, or single ones."""
    group: list[Subnet] = []
    used = 0
    for subnet in subnets:
        size = 4 * images * backbone.feature_width(subnet)
        if group and used + size > MEMORY:
            yield group
            group, used = [], 0
        group.append(subnet)
        used += size
    yield group


def linear_of_subnet(
    backbone: Backbone, subnet: Subnet, data: DataSplit, config: Config, world: World
) -> list[LinearScore]:
    """The linear classifiers of a subnet, best first."""
    train, queries = (
        _extract([probe_input(backbone, subnet)], source, config, world) for source in _labelled(data)
    )

    def scored() -> list[LinearScore]:
        assert train is not None and queries is not None  # the main process has them
        return linear_accuracy(
            train.features[0], train.labels, queries.features[0], queries.labels,
            config.method.backbone.feature_width(subnet), world.device,
            seed=config.method.seed,
        )  # fmt: skip

    return world.from_main(scored)


def knn_of_pixels(data: DataSplit, config: Config) -> dict[int, float]:
    """k-NN accuracy of the raw pixels."""
    world = World(0, 1, torch.device("cpu"))
    bank, queries = (
        _extract([pixels(config.method.crops)], source, config, world) for source in _labelled(data)
    )
    assert bank is not None and queries is not None
    return _knn(bank, queries, 0, world.device)


def _extract(
    functions: Sequence[Function], source: ImageSource, config: Config, world: World
) -> FeatureSet | None:
    method, workers = config.method, config.performance.workers
    return extract_features(functions, source, method.crops, world, canvas=method.canvas, workers=workers)


def plot_scores(
    scores: Sequence[SubnetScore], path: Path, data: str, baseline: tuple[str, float] | None = None
) -> None:
    """Draw accuracy against parameters, a line per width; hollow marks are before training."""
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for width in sorted({s.subnet.width for s in scores}):
        line = sorted((s for s in scores if s.subnet.width == width), key=lambda s: s.parameters)
        sizes = [s.parameters for s in line]
        (drawn,) = axes.plot(sizes, [100 * s.knn[REPORTED_K] for s in line], "o-", label=f"width {width}")
        first = [100 * s.initial[REPORTED_K] for s in line if s.initial]
        if first:
            axes.plot(sizes, first, "o:", color=drawn.get_color(), markerfacecolor="white", linewidth=1)
    if baseline:
        axes.axhline(100 * baseline[1], color="grey", linewidth=1, linestyle="--", label=baseline[0])
    before = " (hollow: before training)" if scores[0].initial else ""
    axes.set(xlabel="parameters", ylabel=f"{REPORTED_K}-NN accuracy, %", xscale="log")
    axes.set_title(f"One training run, {len(scores)} models: {data}{before}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_figure(figure, path, 150)


def _labelled(data: DataSplit) -> tuple[ImageSource, ImageSource]:
    if data.test is None:
        raise InputError(f"k-NN: expected held-out images with labels, got none ({data.untested})")
    return data.train.labelled(), data.test


def _limited(source: ImageSource, limit: int | None) -> ImageSource:
    if limit is None or limit >= len(source):
        return source
    return source.subset(np.linspace(0, len(source) - 1, limit).astype(np.int64))


def _knn(bank: FeatureSet, queries: FeatureSet, number: int, device: torch.device) -> dict[int, float]:
    return knn_accuracy(
        bank.features[number], bank.labels, queries.features[number], queries.labels, device=device
    )
