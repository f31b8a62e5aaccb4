"""`PYTHONPATH=tests python -m helpers.record_step FOLDER`: what a step computes in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from helpers.tiny import tiny_config, tiny_pyramid
from poa import step as step_module
from poa.checkpoint import RunFolder
from poa.config import Config
from poa.data.sources import open_data
from poa.distributed import World, init_distributed
from poa.train import Trainer
from poa.tribranch import Targets

MICRO_BATCHES = 4
OPTIONS = [f"method.micro_batches={MICRO_BATCHES}", "method.optim.ibot_start_epoch=0"]
CENTERING = [*OPTIONS, "method.loss.targets=centering"]
VARIANTS = {
    "per-rank": tiny_config(*OPTIONS),
    "without KoLeo": tiny_config(*OPTIONS, "method.loss.koleo=0"),
    "bf16 reduction": tiny_config(*OPTIONS, "method.reduce_dtype=bf16"),
    "shared": tiny_config(*OPTIONS, "method.sampling=shared", "performance.backward=apart"),
    "balanced": tiny_config(*OPTIONS, "method.sampling=balanced"),
    "exact centers": tiny_config(*CENTERING),
    "official centers": tiny_config(*CENTERING, "method.loss.center_weighting=official"),
    "swin": tiny_pyramid("swin", *OPTIONS, "method.backbone.drop_path=0.2"),
    "resnet": tiny_pyramid("resnet", *OPTIONS),
}


def record(world: World, config: Config) -> dict[str, object]:
    """Losses, targets, gradients and centers of the first step."""
    data = open_data("digits", config.data.holdout, config.method.seed)
    run = Trainer(config, RunFolder(Path(sys.argv[1])), data, world)
    run.wrap()
    seen: list[Targets] = []
    compute = step_module.teacher_targets

    def noted(*inputs: object) -> list[Targets]:
        seen[:] = compute(*inputs)  # type: ignore[arg-type]
        return list(seen)

    step_module.teacher_targets = noted  # type: ignore[assignment]
    try:
        report = run.step(0, next(run.batches(range(1))), observed=True)
    finally:
        step_module.teacher_targets = compute
    figures = report.values | report.health
    values = torch.stack([v.float() for v in figures.values()])
    return {
        "subnets": [str(run.sampler.draw(0, micro_batch)) for micro_batch in run.micro_batches],
        "masked": [len(t.patches[0].logits) for t in seen],
        "values": dict(zip(figures, world.mean(values).tolist(), strict=True)),
        "targets": [[head.dense() for head in [*t.cls, *t.patches]] for t in seen],
        "gradients": {name: p.grad for name, p in run.state.student.named_parameters()},
        "centers": [*run.state.centers.cls, *run.state.centers.patches],
    }


def main() -> None:
    torch.set_num_threads(1)
    with init_distributed("cpu") as world:
        results = {name: record(world, config) for name, config in VARIANTS.items()}
        torch.save(results, Path(sys.argv[1]) / f"{world.size}-{world.rank}.pt")


if __name__ == "__main__":
    main()
