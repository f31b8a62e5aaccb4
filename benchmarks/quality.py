"""Training quality against wall time: k-NN accuracy of teacher subnets, ours and the official code.

Both start from the same weights and see the same batches of the same run; evaluation does not count as time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.peers.official import OfficialStep, require_checkout
from benchmarks.results import Row, place
from poa.backbones import Backbone
from poa.checkpoint import RunFolder
from poa.config import Config, with_data
from poa.distributed import World
from poa.evaluate import REPORTED_K, knn_of_subnets
from poa.micro_batch import MicroBatch
from poa.network import Network
from poa.presets import preset
from poa.step import train_step
from poa.train import Trainer

POINTS = 4  # evaluations after the first


class Ours:
    """The trainer's step."""

    def __init__(self, run: Trainer):
        self.run = run

    def step(self, number: int, micro_batch: MicroBatch) -> None:
        run = self.run
        train_step(run.model, run.state, run.config, run.schedules, number, [micro_batch])

    def teacher(self) -> Backbone:
        return self.run.state.teacher.backbone

    def close(self) -> None:
        """Nothing to release."""


class Official:
    """The official step on the same batches, schedules and subnets."""

    def __init__(self, run: Trainer, checkout: Path):
        self.run, method = run, run.config.method
        self.official = OfficialStep(checkout, method, run.world.device)
        self.official.load_from(run.state.student)
        self.official.start_optimizer(method.optim)
        print("    official code, patched:", *self.official.patches, sep="\n        ")
        self.network = Network(method.backbone, method.head).to(run.world.device)

    def step(self, number: int, micro_batch: MicroBatch) -> None:
        schedules, official = self.run.schedules, self.official
        official.set_rates(
            schedules.lr[number], schedules.last_layer_lr[number], schedules.weight_decay[number]
        )
        official.step(
            micro_batch.batch,
            self.run.sampler.draw(number, 0),
            schedules.teacher_temperature[number],
            schedules.momentum[number],
            self.run.config.method.optim.clip,
            ibot=number >= schedules.ibot_start,
        )

    def teacher(self) -> Backbone:
        self.official.load_into(self.network, "teacher")
        return self.network.backbone

    def close(self) -> None:
        self.official.close()


def run(name: str, data: str, device: torch.device, minutes: float, official: Path | None) -> list[Row]:
    """Train for so many minutes each and evaluate on the way, on data as of `poa pretrain --data`.

    Raises:
        ValueError: the data has no classes to evaluate on, or `official` is no checkout of the official code.
    """
    if official is not None:
        require_checkout(official)
    config = with_data(preset(name), data)
    makers: dict[str, Callable[[Trainer], Ours | Official]] = {"ours": Ours}
    if official is not None:
        makers["official"] = lambda run: Official(run, official)
    else:
        print("    official     not measured: no checkout was named with --official")
    rows = []
    for which, make in makers.items():
        rows += _train(which, make, config, device, minutes * 60)
    return rows


def _train(
    which: str,
    make: Callable[[Trainer], Ours | Official],
    config: Config,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    source = config.open()
    if source.test is None:
        raise ValueError(f"--data: expected class folders to evaluate on, got {config.data.source}")
    with tempfile.TemporaryDirectory() as folder:
        whole = Trainer(config, RunFolder(Path(folder)), source, World(0, 1, device))
        trainer = make(whole)
        rows, spent, images, due = [], 0.0, 0, 0.0
        steps = range(whole.schedules.total_steps)
        for number, (canvases,) in zip(steps, whole.batches(steps), strict=True):
            if spent >= due:
                rows += _evaluate(which, trainer, whole, spent, images)
                due += seconds / POINTS
            if spent >= seconds:
                break
            started = time.perf_counter()
            trainer.step(number, whole.prepare(number, 0, canvases))
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent += time.perf_counter() - started
            images += config.method.batch_size
        else:
            rows += _evaluate(which, trainer, whole, spent, images)
        trainer.close()
    return rows


def _evaluate(which: str, trainer: Ours | Official, whole: Trainer, seconds: float, images: int) -> list[Row]:
    subnets = [whole.space.intact, whole.space.smallest]
    limit = whole.config.run.knn_images
    scores = knn_of_subnets(trainer.teacher(), subnets, whole.data, whole.config, whole.world, limit)
    assert scores is not None
    shown = ", ".join(f"{s} {score[REPORTED_K]:.1%}" for s, score in zip(subnets, scores, strict=True))
    print(f"    {which:10}{seconds:8.1f} s {images:8} images  {shown}", flush=True)
    return [
        {
            "op": "quality",
            "provider": which,
            "mode": str(subnet),
            "shape": whole.config.data.source,
            "dtype": whole.config.method.precision,
            "seconds": seconds,
            "images": images,
            "accuracy": score[REPORTED_K],
            "k": REPORTED_K,
            **place(whole.world.device.type),
        }
        for subnet, score in zip(subnets, scores, strict=True)
    ]
