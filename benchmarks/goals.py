"""What a step of ViT-L/16 with 64 images shall reach on each GPU, beside what was measured there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.results import Row
from benchmarks.roofline import GPUS, Ceilings, Summary, Workload, mean_step
from poa.presets import preset

PRESET, IMAGES = "vit-l16", 64


@dataclass(frozen=True)
class Goal:
    """Images/s of the trainer's step, for the mix of subnets.

    Attributes:
        accept: less is a defect.
        target: what the design aims at.
        stretch: every kernel at the best efficiency published for its kind.
        ceilings: of the GPU.
    """

    accept: int
    target: int
    stretch: int
    ceilings: Ceilings

    @property
    def floor(self) -> float:
        """Images/s if every kernel ran at the ceilings."""
        work = Workload.of(preset(PRESET).method, IMAGES)
        return IMAGES / Summary.of(mean_step(work), self.ceilings).floor


GOALS = {
    "NVIDIA H200": Goal(300, 340, 365, GPUS["h200"]),
    "NVIDIA H100 80GB HBM3": Goal(275, 310, 335, GPUS["h100"]),
}


def goal_lines(rows: Iterable[Row]) -> list[list[str]]:
    """A line for each GPU: accept, target and stretch, the model's bound, what was measured last."""
    shape = f"{preset(PRESET).method.backbone.space.intact} {IMAGES} images"
    measured = {
        row["gpu"]: f"{row['images_per_s']:.0f}"
        for row in rows
        if (row["op"], row["provider"], row["mode"], row["shape"]) == ("step", "ours", "mix", shape)
    }
    return [
        [gpu, *(str(n) for n in (goal.accept, goal.target, goal.stretch)), f"{goal.floor:.0f}"]
        + [measured.get(gpu, "not measured")]
        for gpu, goal in GOALS.items()
    ]
