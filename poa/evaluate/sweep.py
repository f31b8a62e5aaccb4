"""Scores of many subnets: all protocols on one pass over the images."""

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

from poa.backbones import Backbone
from poa.checkpoint import Checkpoint, RunFolder, log
from poa.config import Config
from poa.data.layout import DATASET
from poa.data.sources import DataSplit, ImageSource
from poa.data.storage import is_url
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate.baselines import DESCRIBE, Baseline
from poa.evaluate.features import MEMORY, FeatureSet, extract_features
from poa.evaluate.knn import KNN
from poa.evaluate.protocol import Function, Labelled, Protocol, Task
from poa.evaluate.scores import Report, SubnetScore
from poa.evaluate.suite import Folders, open_folders
from poa.files import read_json
from poa.subnets import Subnet
from poa.version import VERSION


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
    return name if name == "digits" or name.startswith(DATASET) or is_url(name) else os.path.abspath(name)


def evaluation_file(folder: Path, data: str, branch: str, step: int) -> Path:
    """Where an evaluation goes in the folder of a run or model: `evaluation.json`, or `evaluation-2.json` and
    so on where that is of other data, of another branch or of another step."""
    for number in itertools.count(1):
        path = folder / (f"evaluation-{number}.json" if number > 1 else "evaluation.json")
        if not path.exists():
            return path
        with suppress(InputError, KeyError, TypeError):
            settings = read_json(path, "evaluation")["settings"]
            there = settings["data"], settings["branch"], settings["step"]
            if there == (data_place(data), branch, step):
                return path
    raise AssertionError


def evaluate_subnets(
    backbone: Backbone,
    subnets: Sequence[Subnet],
    data: DataSplit,
    config: Config,
    world: World,
    origin: Origin,
    *,
    initial: Backbone | None = None,
    protocols: Sequence[Protocol] = (KNN,),
    folders: Folders | None = None,
    baselines: bool = False,
) -> Iterator[Report]:
    """Score subnets on the held-out images by what the training images teach; the last report has it all.

    The weights are on the device of `world`, whose processes all extract features; `initial` ones, of before
    training, are scored too, and so are `baselines`. `folders` are of protocols that have images of their
    own, which take long: there is a report before them and after each network, so that none is lost if a
    later one fails.
    """
    crops, seed, network = config.method.crops, config.method.seed, config.method.backbone
    opened = open_folders(folders or {}, crops, world)

    def each(p: Protocol) -> Iterator[tuple[Subnet | str, str, Any, Subnet]]:
        for name, weights in ((p.name, backbone), (p.before, initial)):
            yield from ((subnet, name, weights, subnet) for subnet in subnets if weights is not None)
        for kind in p.baselines if baselines else ():
            yield kind, p.name, Baseline(kind, network, crops), network.space.intact

    for p, images in opened:
        for _, _, weights, subnet in each(p):
            assert p.folder
            world.from_main(partial(p.folder.check, weights, subnet, images))
    asked = {
        (row, name): p.task(weights, subnet, crops)
        for p in protocols
        for row, name, weights, subnet in each(p)
    }
    values = dict(zip(asked, score(list(asked.values()), data, config, world), strict=True))

    def of(wanted: Subnet | str) -> dict[str, Any]:
        return {name: value for (row, name), value in values.items() if row == wanted}

    settings = vars(origin) | {
        "data": data_place(config.data.source),
        "images": data.digest(),
        "bank_images": len(data.train.labelled()),
        "query_images": len(data.test or ()),
        "image_size": crops.global_size,
        "resize": crops.eval_resize(),
        "mean": list(crops.mean),
        "std": list(crops.std),
        **{p.name: dict(p.settings) for p in protocols},
    }

    def report() -> Report:
        scores = [SubnetScore(s, network.parameters(s), network.flops(s), of(s)) for s in subnets]
        lower = {kind: of(kind) for kind in DESCRIBE} if baselines else {}
        return Report(scores, dict(settings), lower)

    yield report()
    for p, images in opened:
        settings[p.name] = dict(p.settings)
        for row, name, weights, subnet in each(p):
            assert p.folder
            scored = partial(p.folder.score, weights, subnet, images, world.device, seed)
            values[row, name] = world.from_main(scored)
            yield report()


def knn_of_subnets(
    backbone: Backbone,
    subnets: Sequence[Subnet],
    data: DataSplit,
    config: Config,
    world: World,
    limit: int | None = None,
) -> list[dict[int, float]]:
    """k-NN accuracy of each subnet by k; the arguments are those of `score`."""
    return score([KNN.task(backbone, s, config.method.crops) for s in subnets], data, config, world, limit)


def score(
    tasks: Sequence[Task], data: DataSplit, config: Config, world: World, limit: int | None = None
) -> list[Any]:
    """Scores of features by protocols, which learn from the training images and ask the test images.

    Images are decoded once for as many features as have room at a time; at most `limit` of either, spread
    over the data. All processes of `world` extract features.
    """
    if data.test is None:
        raise InputError(f"evaluation: expected held-out images with labels, got none ({data.untested})")
    sources = [limited(source, limit) for source in (data.train.labelled(), data.test)]
    scores: list[Any] = []
    for group in _groups(tasks, max(len(source) for source in sources), config, world.device):
        learning = [task.features for task in group if task.protocol.learns]
        train = _extract(learning, sources[0], config, world) if learning else None
        queries = _extract([task.queries for task in group], sources[1], config, world)
        protocols = [task.protocol for task in group]
        scores += world.from_main(
            partial(_scores, protocols, train, queries, world.device, config.method.seed)
        )
    return scores


def _scores(
    protocols: Sequence[Protocol],
    train: FeatureSet | None,
    queries: FeatureSet | None,
    device: torch.device,
    seed: int,
) -> list[Any]:
    """Those of each of the features; the main process has them."""
    assert queries is not None
    if unreadable := (train.unreadable if train else []) + queries.unreadable:
        log.warning(
            "evaluation: %d images could not be read, the first is %s", len(unreadable), unreadable[0]
        )
    if not len(queries.labels) or (train and not len(train.labels)):
        raise InputError(f"evaluation: expected images that can be read, got none: {unreadable[0]}")
    learned = iter(train.features if train else ())
    empty, scores = Labelled(torch.zeros(0), queries.labels[:0]), []
    for protocol, features in zip(protocols, queries.features, strict=True):
        known = Labelled(next(learned), train.labels) if protocol.learns and train else empty
        scores.append(protocol.score(known, Labelled(features, queries.labels), device, seed))
    return scores


@torch.no_grad()
def _groups(tasks: Sequence[Task], images: int, config: Config, device: torch.device) -> Iterator[list[Task]]:
    """Neighbours whose features of so many images fit into `MEMORY` together, or single ones."""
    size, group, used = config.method.crops.global_size, list[Task](), 0
    blank = torch.zeros(1, config.method.backbone.channels, size, size, device=device)
    for task in tasks:
        row = task.queries(blank)
        needed = images * row.numel() * row.element_size()
        if group and used + needed > MEMORY:
            yield group
            group, used = [], 0
        group.append(task)
        used += needed
    yield group


def _extract(
    functions: Sequence[Function], source: ImageSource, config: Config, world: World
) -> FeatureSet | None:
    method, workers = config.method, config.performance.workers
    return extract_features(functions, source, method.crops, world, canvas=method.canvas, workers=workers)


def limited(source: ImageSource, limit: int | None) -> ImageSource:
    """At most so many images, spread over the source."""
    if limit is None or limit >= len(source):
        return source
    return source.subset(np.linspace(0, len(source) - 1, limit).astype(np.int64))
