"""Scores of many subnets: all protocols on one pass over the images; table, JSON and plot."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
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
from poa.data.summary import LeftOut
from poa.distributed import World
from poa.drawing import write_figure
from poa.errors import InputError
from poa.evaluate.correspondence import CORRESPONDENCE
from poa.evaluate.features import MEMORY, FeatureSet, extract_features, pixels
from poa.evaluate.kmeans import KMEANS
from poa.evaluate.knn import KNN
from poa.evaluate.linear import LINEAR
from poa.evaluate.logistic import LOGISTIC
from poa.evaluate.protocol import Function, Labelled, Protocol, Task
from poa.evaluate.quality import QUALITY, spearman
from poa.evaluate.retrieval import RETRIEVAL
from poa.evaluate.robustness import ROBUSTNESS, curves
from poa.evaluate.segmentation import SEGMENTATION, open_scenes, segmentation
from poa.evaluate.top1 import TOP1
from poa.files import read_json, write_json
from poa.subnets import Subnet
from poa.table import Table
from poa.version import VERSION

# All protocols, in the order of their columns.
PROTOCOLS: tuple[Protocol, ...] = (
    KNN, TOP1, LINEAR, LOGISTIC, KMEANS, RETRIEVAL, QUALITY, CORRESPONDENCE, SEGMENTATION, ROBUSTNESS
)  # fmt: skip
SEPARATE = (TOP1, SEGMENTATION)  # scored where a run has classifiers, or there are masks
FEWEST = 4  # subnets, before a correlation means anything


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
    """Size and scores of one subnet.

    Attributes:
        subnet, parameters, flops: which, and its size.
        values: the score of each protocol by its name, and of the weights before training by `before`.
    """

    subnet: Subnet
    parameters: int
    flops: int
    values: Mapping[str, Any]

    def columns(self) -> dict[str, float]:
        """All accuracies by the title of their column."""
        figures: dict[str, float] = {}
        for p in PROTOCOLS:
            if p.name in self.values:
                figures |= p.accuracies(self.values[p.name])
            if p.before in self.values:
                figures[f"{p.reported} init"] = p.headline(self.values[p.before])
        return figures


def reported(values: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy that stands for each protocol, out of scores as in `SubnetScore` or read from JSON."""
    return {p.reported: p.headline(values[p.name]) for p in PROTOCOLS if p.name in values}


def number_format(title: str) -> str:
    """How a figure is written: a share of 1 in per cent."""
    kind = title.removesuffix(" init")
    return ".2f" if any(kind in p.numbers for p in PROTOCOLS) else ".1%"


def accuracies(values: Mapping[str, Any]) -> dict[str, float]:
    """All accuracies of such scores by the titles of their columns."""
    columns_of = [p.accuracies(values[p.name]) for p in PROTOCOLS if p.name in values]
    return {title: accuracy for columns in columns_of for title, accuracy in columns.items()}


@dataclass(frozen=True, repr=False)
class Report:
    """Scores of subnets, with all settings that the numbers depend on; shows itself as a table.

    Attributes:
        scores: of each subnet.
        settings: of them all.
        files: in which they lie.
    """

    scores: list[SubnetScore]
    settings: dict[str, Any]
    files: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        rows = [
            {"subnet": s.subnet, "params": s.parameters, "GFLOPs": s.flops / 1e9, **s.columns()}
            for s in self.scores
        ]
        formats = {title: number_format(title) for title in self.scores[0].columns()}
        return Table(rows, {"params": ",", "GFLOPs": ".3f", **formats})._repr_html_()

    def table(self) -> str:
        """A text table: the settings, then one line per subnet."""
        s, rows = self.settings, [score.columns() for score in self.scores]
        wide = {title: max(6, len(title)) for title in rows[0]}
        lines = [
            f"{s['run']}: {s['branch']} of step {s['step']}",
            f"{s['data']}: {s['bank_images']:,} bank and {s['query_images']:,} query images "
            f"of {s['image_size']} px",
            *(p.described() for p in PROTOCOLS if p.name in s),
            f"{'subnet':>9} {'params':>11} {'GFLOPs':>8}" + "".join(f"  {t:>{w}}" for t, w in wide.items()),
        ]
        for score, row in zip(self.scores, rows, strict=True):
            line = f"{score.subnet!s:>9} {score.parameters:>11,} {score.flops / 1e9:>8.3f}"
            lines.append(line + "".join(f"  {row[t]:>{w}{number_format(t)}}" for t, w in wide.items()))
        if ranks := self.correlations():
            told = ", ".join(f"{title} {value:.2f}" for title, value in ranks.items())
            lines.append(f"Spearman's correlation with {KNN.reported} over {len(rows)} subnets: {told}")
        return "\n".join(lines)

    def correlations(self) -> dict[str, float]:
        """Rank correlation with k-NN of the figures that need no labels, over the subnets; none of few."""
        rows = [score.columns() for score in self.scores]
        titles = [title for title in QUALITY.numbers if title in rows[0]]
        if len(rows) < FEWEST:
            return {}
        known = [row[KNN.reported] for row in rows]
        return {title: spearman([row[title] for row in rows], known) for title in titles}

    def write(self, path: Path) -> None:
        """Write JSON."""
        rows = [
            {
                "subnet": str(s.subnet),
                "width": s.subnet.width,
                "depth": s.subnet.depth,
                "params": s.parameters,
                "flops": s.flops,
                **s.values,
            }
            for s in self.scores
        ]
        ranks = {"correlations": found} if (found := self.correlations()) else {}
        write_json(path, {"settings": self.settings, "subnets": rows, **ranks})

    def plot(self, path: Path | None = None, baseline: tuple[str, float] | None = None) -> Any:
        """Draw the figure of each protocol against parameters, a line per width; hollow: before training.

        A `path` is written to, too; its ending chooses the format. The baseline, a name and a k-NN accuracy,
        is a horizontal line. Returns a figure of matplotlib. Curves of robustness over the strength of damage
        go into another file, `NAME-robustness`.
        """
        from matplotlib.figure import Figure  # optional, and slow to import

        protocols = [p for p in PROTOCOLS if p.name in self.scores[0].values]
        figure = Figure(figsize=(6.4 * len(protocols), 4.0), layout="constrained")
        for axes, protocol in zip(
            figure.subplots(1, len(protocols), squeeze=False)[0], protocols, strict=True
        ):
            self._draw(axes, protocol)
            if baseline and protocol is protocols[0]:
                axes.axhline(100 * baseline[1], color="grey", linewidth=1, linestyle="--", label=baseline[0])
            axes.legend(fontsize=8)
        if path:
            write_figure(figure, path, 150)
            name = ROBUSTNESS.name
            if damaged := {str(s.subnet): s.values[name] for s in self.scores if name in s.values}:
                write_figure(curves(damaged), path.with_stem(f"{path.stem}-{name}"), 100)
        return figure

    def _draw(self, axes: Any, protocol: Protocol) -> None:
        """Draw a panel."""
        number = protocol.reported in protocol.numbers
        for width in sorted({s.subnet.width for s in self.scores}):
            line = sorted((s for s in self.scores if s.subnet.width == width), key=lambda s: s.parameters)
            sizes = [s.parameters for s in line]
            after, before = (
                [(1 if number else 100) * protocol.headline(s.values[name]) for s in line if name in s.values]
                for name in (protocol.name, protocol.before)
            )
            (drawn,) = axes.plot(sizes, after, "o-", label=f"width {width}")
            if before:
                axes.plot(sizes, before, "o:", color=drawn.get_color(), markerfacecolor="white", linewidth=1)
        hollow = " (hollow: before training)" if protocol.before in self.scores[0].values else ""
        named = protocol.reported if number else f"accuracy, {protocol.name} {protocol.reported}, %"
        axes.set(xlabel="parameters", ylabel=named, xscale="log")
        data = Path(self.settings["data"]).name
        axes.set_title(f"One training run, {len(self.scores)} models: {data}{hollow}", fontsize=10)
        axes.grid(alpha=0.3)


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
    masks: Path | None = None,
) -> Report:
    """Score subnets on the held-out images by what the training images teach.

    The weights are on the device of `world`, whose processes all extract features; `initial` ones, of before
    training, are scored too. `masks` is a folder of images and masks to segment.
    """
    crops, left_out = config.method.crops, LeftOut()
    scenes = open_scenes(masks, crops, left_out) if masks else None
    if left_out:
        log.warning("segmentation: left out: %s", left_out)
    asked = {
        (subnet, name): p.task(weights, subnet, crops)
        for p in protocols
        for name, weights in ((p.name, backbone), (p.before, initial))
        if weights is not None
        for subnet in subnets
    }
    values = dict(zip(asked, score(list(asked.values()), data, config, world), strict=True))
    seed, network = config.method.seed, config.method.backbone
    if scenes:
        protocols = [*protocols, SEGMENTATION]
        for subnet in subnets:
            segment = partial(segmentation, backbone, subnet, scenes, world.device, seed)
            values[subnet, SEGMENTATION.name] = world.from_main(segment)
    scores = [
        SubnetScore(
            subnet,
            network.parameters(subnet),
            network.flops(subnet),
            {name: value for (of, name), value in values.items() if of == subnet},
        )
        for subnet in subnets
    ]
    settings = {
        "data": data_place(config.data.source),
        "bank_images": len(data.train.labelled()),
        "query_images": len(data.test or ()),
        "image_size": crops.global_size,
        "resize": crops.eval_resize(),
        "mean": list(crops.mean),
        "std": list(crops.std),
        **{p.name: dict(p.settings) for p in protocols},
    }
    return Report(scores, vars(origin) | settings)


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


def knn_of_pixels(data: DataSplit, config: Config) -> dict[int, float]:
    """k-NN accuracy of the raw pixels."""
    (accuracy,) = score(
        [Task(KNN, pixels(config.method.crops))], data, config, World(0, 1, torch.device("cpu"))
    )
    return accuracy


def score(
    tasks: Sequence[Task], data: DataSplit, config: Config, world: World, limit: int | None = None
) -> list[Any]:
    """Scores of features by protocols.

    Images are decoded once for as many features as have room at a time.

    Args:
        tasks: protocols and features.
        data: training images are learned from, test images are asked.
        config: of the run.
        world: this process; all of them extract features.
        limit: use at most this many images of either, spread over the data.
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
