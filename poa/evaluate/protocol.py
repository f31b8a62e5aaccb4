"""What an evaluation protocol is: features of a subnet, and their score.

A protocol is a file of its own and a name in `PROTOCOLS` of `suite.py`. Table, JSON, settings, the options of
`poa evaluate` and the page of a run follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poa.backbones import Backbone
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import InputError
from poa.options import Options
from poa.subnets import Subnet

Function = Callable[[Tensor], Tensor]
"""From normalised images `[B, C, S, S]` to features `[B, ...]`."""


class Labelled(NamedTuple):
    """Features `[N, ...]` of images, on the CPU, and their labels, int64 `[N]`."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class OfFolder:
    """How a protocol scores a subnet on a folder of its own, instead of by features of the images at hand.

    Attributes:
        options: with their defaults; they are a part of the settings.
        open: from folder, crops of the run, options and a count of what is left out to what `score` takes,
            whose `counts()` are the numbers of its images, by part.
        score: a subnet on that, on a device, by a seed; a JSON value.
        check: raises InputError where a subnet cannot be scored on that; before anything is. Like `score`,
            the main process alone calls it.
    """

    options: Options
    open: Callable[[Path, CropsConfig, Any, LeftOut], Any]
    score: Callable[[Backbone, Subnet, Any, torch.device, int], Any]
    check: Callable[[Backbone, Subnet, Any], object] = lambda *_: None


@dataclass(frozen=True)
class Protocol:
    """A way to score a subnet by its features.

    Attributes:
        name: of its scores in JSON, its settings and its option `--NAME`.
        help: of the option; None for a protocol that always scores.
        features: what is scored of a subnet.
        score: from the features of training images and of queries, a device to compute on and a seed to a
            JSON value.
        accuracies: those in such a value, also one out of a file, by the title of their column; in 0..1.
        reported: title of the one that curves, plots and pages show.
        settings: what scores depend on, besides weights and data; "protocol" says in words what is done.
        learns: from training images; without it, those in `score` are empty.
        queries: what is scored of the queries, where that is other than of the training images.
        needs: name of an optional package.
        numbers: titles among `accuracies` of what is no share of 1.
        folder: how it is scored where it has images of its own; its option takes their folder.
        baselines: those of `baselines.DESCRIBE` that it can score.
    """

    name: str
    help: str | None
    features: Callable[[Backbone, Subnet], Function]
    score: Callable[[Labelled, Labelled, torch.device, int], Any]
    accuracies: Callable[[Any], Mapping[str, float]]
    reported: str
    settings: Mapping[str, Any]
    learns: bool = True
    queries: Callable[[Backbone, Subnet, CropsConfig], Function] | None = None
    numbers: tuple[str, ...] = ()
    needs: str = ""
    folder: OfFolder | None = None
    baselines: tuple[str, ...] = ("pixels", "histogram")

    def task(self, backbone: Backbone, subnet: Subnet, crops: CropsConfig) -> Task:
        """What is to be scored of a subnet on images of these crops."""
        own = self.queries(backbone, subnet, crops) if self.queries else None
        return Task(self, self.features(backbone, subnet), own)

    @property
    def before(self) -> str:
        """Name of its scores before training."""
        return f"{self.name}_init"

    def headline(self, score: Any) -> float:
        """The accuracy that stands for a score."""
        return self.accuracies(score)[self.reported]

    def described(self, settings: Mapping[str, Any]) -> str:
        """Settings of a score in a line."""
        shown = [f"{self.name}: {settings['protocol']}"]
        for key, value in settings.items():
            numbers = ", ".join(f"{x:g}" for x in value) if isinstance(value, list) else value
            shown += [f"{key} {numbers}"] if key != "protocol" else []
        return "; ".join(shown)


class Task(NamedTuple):
    """Features of training images and, where they are others, of queries, and how they are scored."""

    protocol: Protocol
    features: Function
    own: Function | None = None

    @property
    def queries(self) -> Function:
        return self.own or self.features


def folder_protocol(
    name: str,
    help: str,
    folder: OfFolder,
    accuracies: Callable[[Any], Mapping[str, float]],
    reported: str,
    settings: Mapping[str, Any],
    **options: Any,
) -> Protocol:
    """A protocol that has images of its own; the arguments are those of `Protocol`."""

    def no_features(*_: object) -> Any:
        raise InputError(f"{name}: expected a folder of its own: --{name} FOLDER")

    features = no_features, no_features
    return Protocol(name, help, *features, accuracies, reported, settings, folder=folder, **options)
