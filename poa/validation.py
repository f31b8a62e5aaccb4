"""Evaluations during training: k-NN accuracies and label-free measures of held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from poa.config import Config
from poa.data.sources import DataSplit
from poa.distributed import World
from poa.errors import DivergenceError
from poa.evaluate import REPORTED_K, knn_accuracy
from poa.evaluate.knn import KNN
from poa.evaluate.protocol import Protocol
from poa.evaluate.quality import QUALITY, TITLES
from poa.evaluate.sweep import score
from poa.metrics import Journal
from poa.plan import evaluated_subnets
from poa.progress import Progress
from poa.step import TrainingState

UNLABELLED = 1024  # held-out images, at most, that measures without labels see, four views of each
WATCHED = replace(
    KNN,
    score=lambda bank, queries, device, _: knn_accuracy(*bank, *queries, (REPORTED_K,), device=device)[
        REPORTED_K
    ],
)
"""20-NN accuracy alone."""


class Validation:
    """Scores the teacher's chosen subnets and the intact student, and writes the scores into the metrics."""

    def __init__(self, config: Config, data: DataSplit, world: World, journal: Journal):
        self.config, self.data, self.world, self.journal = config, data, world, journal
        intact = config.method.backbone.space.intact
        self.subnets = {"teacher": evaluated_subnets(config), "student": [intact]}

    def is_missing(self, step: int, total: int) -> bool:
        """Whether the state before the next of `total` steps should have been evaluated and was not."""
        every = self.config.run.evaluate_every
        if every == 0 or (step % every and step != total):
            return False
        return not any("knn" in row and row["step"] == step for row in self.journal.folder.rows())

    def run(self, done: int, state: TrainingState, progress: Progress) -> None:
        """Score the networks after `done` steps, where there are held-out images."""
        if self.data.test is None:
            return
        method, limit = self.config.method, self.config.run.knn_images
        named = {
            f"{branch} {subnet}": (network.backbone, subnet)
            for branch, network in (("teacher", state.teacher), ("student", state.student))
            for subnet in self.subnets[branch]
        }

        def of_all(protocol: Protocol, most: int) -> dict[str, Any]:
            tasks = [protocol.task(*network, method.crops) for network in named.values()]
            return dict(zip(named, score(tasks, self.data, self.config, self.world, most), strict=True))

        scores, unlabelled = of_all(WATCHED, limit), of_all(QUALITY, min(limit, UNLABELLED))
        by_measure = {key: {name: found[key] for name, found in unlabelled.items()} for key in TITLES}
        self.journal.write({"step": done, "knn": {"k": REPORTED_K, **scores}, **by_measure})
        shown = ", ".join(f"{name} {score:.1%}" for name, score in scores.items())
        progress.say(f"step {done}: {REPORTED_K}-NN accuracy: {shown}")
        self._require_intact(done, scores)

    def _require_intact(self, done: int, scores: Mapping[str, float]) -> None:
        """Raise DivergenceError where the intact teacher is too far below where it began."""
        name, most = f"teacher {self.config.method.backbone.space.intact}", self.config.run.knn_drop
        rows = self.journal.folder.rows() if name in scores and most < 1 else []
        before = [row["knn"][name] for row in rows if "knn" in row and row["step"] == 0]
        if before and scores[name] < before[0] - most:
            raise DivergenceError(
                f"step {done}: {REPORTED_K}-NN accuracy of {name} fell from {before[0]:.1%} to "
                f"{scores[name]:.1%}, more than run.knn_drop={most:g}; lower method.optim.base_lr, or raise "
                "method.optim.freeze_teacher_epochs"
            )
