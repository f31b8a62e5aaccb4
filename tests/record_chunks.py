"""Record what a step computes in this process: `python record_chunks.py FOLDER`; see test_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny import tiny_config

from poa import step as step_module
from poa.checkpoint import RunFolder
from poa.data.sources import open_data
from poa.distributed import World, world
from poa.train import Run
from poa.tribranch import Targets

CHUNKS = 4
OPTIONS = [f"method.chunks={CHUNKS}", "method.optim.ibot_start_epoch=0"]
VARIANTS = {
    "per-rank": [],
    "without KoLeo": ["method.loss.koleo=0"],
    "bf16 reduction": ["performance.reduce=bf16"],
    "shared": ["method.sampling=shared"],
    "balanced": ["method.sampling=balanced"],
    "exact centers": ["method.loss.targets=centering"],
    "official centers": ["method.loss.targets=centering", "method.loss.center_weighting=official"],
}


def record(here: World, changes: list[str]) -> dict[str, object]:
    """Losses, targets, gradients and centers of the first step."""
    config = tiny_config(*OPTIONS, *changes)
    data = open_data("digits", config.run.holdout, config.method.seed)
    run = Run(config, RunFolder(Path(sys.argv[1])), data, here)
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
        "subnets": [str(run.sampler.draw(0, chunk)) for chunk in run.chunks],
        "masked": [len(t.patches[0].logits) for t in seen],
        "values": dict(zip(figures, here.mean(values).tolist(), strict=True)),
        "targets": [[head.dense() for head in [*t.cls, *t.patches]] for t in seen],
        "gradients": {name: p.grad for name, p in run.state.student.named_parameters()},
        "centers": [*run.state.centers.cls, *run.state.centers.patches],
    }


def main() -> None:
    torch.set_num_threads(1)
    with world("cpu") as here:
        found = {name: record(here, changes) for name, changes in VARIANTS.items()}
        torch.save(found, Path(sys.argv[1]) / f"{here.size}-{here.rank}.pt")


if __name__ == "__main__":
    main()
