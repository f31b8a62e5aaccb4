"""k-NN of many subnets: scores, table, JSON and a plot of accuracy against size."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poa.backbones import ElasticViT
from poa.checkpoint import write_json
from poa.config import Config
from poa.data.sources import DataSplit, ImageSource
from poa.errors import InputError
from poa.evaluate.features import pixel_features, subnet_features
from poa.evaluate.knn import NEIGHBOURS, TEMPERATURE, knn_accuracy
from poa.subnets import Subnet

REPORTED_K = 20
"""The k that tables and plots show."""


@dataclass(frozen=True)
class SubnetScore:
    """Size and accuracy of one subnet; `initial` is the accuracy before training, if it was asked for."""

    subnet: Subnet
    parameters: int
    flops: int
    knn: dict[int, float]
    initial: dict[int, float] | None = None


@dataclass(frozen=True)
class Report:
    """Scores of subnets, with all settings that the numbers depend on."""

    scores: list[SubnetScore]
    settings: dict[str, Any]

    def table(self) -> str:
        """A text table: the settings, then one line per subnet."""
        ks = list(self.scores[0].knn)
        before = "    init" if self.scores[0].initial else ""
        s = self.settings
        lines = [
            f"{s['protocol']}, T={s['temperature']}; {s['data']}: {s['bank_images']} bank and "
            f"{s['query_images']} query images of {s['image_size']} px",
            f"{'subnet':>9} {'params':>11} {'GFLOPs':>8}" + "".join(f"  {f'k={k}':>6}" for k in ks) + before,
        ]
        for score in self.scores:
            line = f"{score.subnet!s:>9} {score.parameters:>11,} {score.flops / 1e9:>8.3f}"
            line += "".join(f"  {score.knn[k]:>6.1%}" for k in ks)
            if score.initial:
                line += f"  {score.initial[REPORTED_K]:>6.1%}"
            lines.append(line)
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write JSON."""
        rows = [
            {
                "width": s.subnet.width,
                "depth": s.subnet.depth,
                "params": s.parameters,
                "flops": s.flops,
                "knn": {str(k): v for k, v in s.knn.items()},
                **({"knn_init": {str(k): v for k, v in s.initial.items()}} if s.initial else {}),
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
        plot_scores(self.scores, path, self.settings["data"], baseline)


def evaluate_subnets(
    backbone: ElasticViT,
    subnets: Sequence[Subnet],
    data: DataSplit,
    config: Config,
    initial: ElasticViT | None = None,
) -> Report:
    """Score subnets on the held-out images with the training images as bank.

    Args:
        backbone: trained weights.
        subnets: which networks.
        data: needs labelled test images.
        config: of the run.
        initial: the weights before training, scored too.
    """
    after = knn_of_subnets(backbone, subnets, data, config)
    before = knn_of_subnets(initial, subnets, data, config) if initial else [None] * len(subnets)
    vit = config.method.backbone
    scores = [
        SubnetScore(s, vit.parameters(s), vit.flops(s), knn, first)
        for s, knn, first in zip(subnets, after, before, strict=True)
    ]
    return Report(scores, evaluation_settings(data, config))


def evaluation_settings(data: DataSplit, config: Config) -> dict[str, Any]:
    """What k-NN figures depend on, besides the weights."""
    crops = config.method.crops
    return {
        "protocol": "weighted k-NN, cosine similarity, class token",
        "temperature": TEMPERATURE,
        "data": config.run.data,
        "bank_images": len(data.train),
        "query_images": len(data.test or ()),
        "image_size": crops.global_size,
        "resize": crops.eval_resize(),
        "mean": list(crops.mean),
        "std": list(crops.std),
    }


def knn_of_subnets(
    backbone: ElasticViT,
    subnets: Sequence[Subnet],
    data: DataSplit,
    config: Config,
    limit: int | None = None,
) -> list[dict[int, float]]:
    """k-NN accuracy of each subnet by k.

    Args:
        backbone, subnets, data, config: as in `evaluate_subnets`.
        limit: use at most this many bank images and as many queries, spread over the data.
    """
    bank, queries = (_limited(source, limit) for source in _labelled(data))
    canvas, workers = config.method.canvas, config.performance.workers
    features = [
        subnet_features(backbone, subnets, s, config.method.crops, canvas=canvas, workers=workers)
        for s in (bank, queries)
    ]
    return [
        _knn(bank, queries, bank_features, query_features)
        for bank_features, query_features in zip(*features, strict=True)
    ]


def knn_of_pixels(data: DataSplit, config: Config) -> dict[int, float]:
    """k-NN accuracy of the raw pixels."""
    bank, queries = _labelled(data)
    crops, canvas = config.method.crops, config.method.canvas
    features = [pixel_features(s, crops, canvas=canvas) for s in (bank, queries)]
    return _knn(bank, queries, *features)


def require_matplotlib() -> None:
    """Raise InputError where plots cannot be drawn, before any work is done for them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plot: expected matplotlib; install it with: pip install 'poa-pretrain[plot]'")


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
    figure.savefig(path, dpi=150)


def _labelled(data: DataSplit) -> tuple[ImageSource, ImageSource]:
    if data.test is None:
        raise InputError("k-NN: expected images in class folders, got images without labels")
    return data.train, data.test


def _limited(source: ImageSource, limit: int | None) -> ImageSource:
    if limit is None or limit >= len(source):
        return source
    return source.subset(np.linspace(0, len(source) - 1, limit).astype(np.int64))


def _knn(bank: ImageSource, queries: ImageSource, b: Tensor, q: Tensor) -> dict[int, float]:
    assert bank.labels is not None
    assert queries.labels is not None
    labels = [torch.from_numpy(source.labels) for source in (bank, queries)]
    return knn_accuracy(b, labels[0], q, labels[1], NEIGHBOURS)
