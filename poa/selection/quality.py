"""What subnets are worth: k-NN accuracies that an evaluation noted, or agreement with the intact network.

CKA     ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features X, Y: 1 where they are the same up to rotation
        and scale. Linear CKA, Kornblith et al., ICML 2019. No labels are needed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poa.backbones import Backbone
from poa.checkpoint import Branch, RunFolder, log
from poa.config import Config
from poa.data.layout import Openers
from poa.data.sources import ImageSource
from poa.distributed import World
from poa.errors import InputError, SaveError
from poa.evaluate.features import extract_features
from poa.evaluate.knn import KNN, REPORTED_K, class_token
from poa.evaluate.quality import rankme
from poa.evaluate.sweep import data_place, limited
from poa.files import read_json, write_json
from poa.subnets import Subnet

AGREEMENT = "agreement.json"


@dataclass(frozen=True)
class Quality:
    """What subnets are ranked by; more is better.

    Attributes:
        name: of its column.
        about: where it comes from, in a line.
        values: by subnet.
        form: format specification of a value.
        scale: that a plot multiplies values with, and `unit` of the product.
        notes: a further column by subnet, of the name `noted`.
    """

    name: str
    about: str
    values: Mapping[Subnet, float]
    form: str
    scale: float = 1.0
    unit: str = ""
    notes: Mapping[Subnet, float] = field(default_factory=dict)
    noted: str = "note"


@dataclass(frozen=True)
class Weights:
    """Whose quality is asked for: a run, its branch, and the step of a checkpoint or None for the newest."""

    folder: RunFolder
    branch: Branch
    step: int | None

    @property
    def wanted_step(self) -> int | None:
        """The step; None where the folder has no checkpoints to tell."""
        checkpoints = self.folder.checkpoints()
        return self.step or (checkpoints[-1].step if checkpoints else None)


def knn_quality(weights: Weights, data: str | None, source: str) -> Quality:
    """20-NN accuracies of an evaluation in the folder of a run.

    `data` is what it was made on; None: the run's own (`source`) if there is such an evaluation, or else any.
    Raises InputError: there is none, or of other steps only.
    """
    run, step = weights.folder.path, weights.wanted_step
    known = []
    for path in sorted(run.glob("evaluation*.json")):
        try:
            content = read_json(path, "evaluation")
            values = {
                Subnet.parse(row["subnet"]): float(KNN.headline(row[KNN.name])) for row in content["subnets"]
            }
            settings = content["settings"]
            if not (settings["step"] and all(0 <= value <= 1 for value in values.values())):
                raise ValueError(path)
            if settings["branch"] == weights.branch and data in (None, settings["data"]):
                known.append((settings["data"] != data_place(source), path, settings, values))
        except (LookupError, TypeError, AttributeError, ValueError):
            log.warning("%s: expected an evaluation, got a damaged or foreign file; left out", path)
    fresh = [evaluation for evaluation in known if step in (None, evaluation[2]["step"])]
    if not fresh:
        got = f"step {', '.join(str(evaluation[2]['step']) for evaluation in known)}" if known else "none"
        of = f" of step {step}" if step else ""
        raise InputError(
            f"select: expected an evaluation{of} of the {weights.branch} in {run}, got {got}; make one: "
            f"poa evaluate {shlex.quote(str(run))}; or rank without labels: --rank agreement"
        )
    _, path, settings, values = min(fresh, key=lambda evaluation: evaluation[:2])
    of = f"{settings['branch']} of step {settings['step']}"
    about = f"{of}, {REPORTED_K}-NN accuracy on {settings['data']} ({path.name})"
    return Quality(f"{REPORTED_K}-NN", about, values, ".1%", 100.0, "accuracy, %")


@dataclass(frozen=True)
class Agreement:
    """Of a subnet: linear CKA with the intact network, in 0..1; RankMe, at least 1."""

    cka: float
    rankme: float


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features `[images, channels_x]` and `[images, channels_y]`, float64 inside."""
    x, y = ((z - z.mean(0)).double() for z in (x, y))
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(y.T @ x) ** 2 / norms) if norms > 0 else 0.0


def agreements(
    backbone: Backbone, subnets: Sequence[Subnet], source: ImageSource, config: Config, world: World
) -> list[Agreement]:
    """Agreement of subnets with the intact network on the class tokens of images; `world` is the only
    process. Raises InputError: fewer than two images can be read."""
    method, workers = config.method, config.performance.workers
    functions = [class_token(backbone, s) for s in [backbone.space.intact, *subnets]]
    extracted = extract_features(
        functions, source, method.crops, world, canvas=method.canvas, workers=workers
    )
    assert extracted is not None
    intact, *others = extracted.features
    if len(intact) < 2:
        raise InputError(f"agreement: expected at least 2 readable images, got {len(intact)}")
    return [Agreement(linear_cka(features, intact), rankme(features)) for features in others]


def agreement_quality(
    weights: Weights, config: Config, images: int, device: torch.device, openers: Openers | None = None
) -> Quality:
    """Linear CKA of all subnets with the intact network, with RankMe beside.

    They are computed on at most so many images, held-out ones if there are any, kept in the folder of the
    run, and read from there when they are asked for again.
    """
    folder, space = weights.folder, config.method.backbone.space
    asked: dict[str, Any] = {"branch": weights.branch, "data": data_place(config.data.source)}
    asked |= {"step": weights.wanted_step, "at_most": images}
    if (agreement := _kept(folder.path / AGREEMENT, asked)) is None:
        network, checkpoint = folder.network(weights.branch, weights.step)
        data = config.open(openers)
        source = limited(data.test or data.train, images)
        backbone, world = network.backbone.to(device), World(0, 1, device)
        agreement = dict(zip(space, agreements(backbone, list(space), source, config, world), strict=True))
        rows = [{"subnet": str(subnet), **asdict(values)} for subnet, values in agreement.items()]
        asked["step"] = checkpoint.step
        try:
            write_json(folder.path / AGREEMENT, {"agreement": asked, "subnets": rows})
        except SaveError as error:
            log.warning("%s; it will be computed again", error)
    about = (
        f"{weights.branch} of step {asked['step']}, agreement with {space.intact} on at most {images:,} "
        f"images of {asked['data']} ({AGREEMENT})"
    )
    values = {subnet: one.cka for subnet, one in agreement.items()}
    notes = {subnet: one.rankme for subnet, one in agreement.items()}
    return Quality("CKA", about, values, ".3f", 1.0, "linear CKA", notes, "RankMe")


def _kept(path: Path, asked: Mapping[str, Any]) -> dict[Subnet, Agreement] | None:
    """What was computed before for the same question."""
    with suppress(InputError, LookupError, TypeError, ValueError):  # or damaged
        content = read_json(path, "agreement")
        if content["agreement"] == asked:
            return {
                Subnet.parse(row["subnet"]): Agreement(float(row["cka"]), float(row["rankme"]))
                for row in content["subnets"]
            }
    return None
