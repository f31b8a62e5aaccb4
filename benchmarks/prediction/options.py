"""What options trade: predicted time and memory of a step, side by side.

    python -m benchmarks options --preset vit-l16 --subnet 640x18

Times are those of `predict` on every GPU that it knows, memory that of `poa memory`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.prediction import step_costs
from benchmarks.prediction.gpus import KNOWN
from benchmarks.report import markdown
from poa.config import Config
from poa.memory import predict_memory
from poa.options import override
from poa.subnets import Subnet

KEEP, TOGETHER, RECOMPUTE = "keep_activations=true", "backward=together", "recompute=true"
CHOICES = ("", KEEP, TOGETHER, f"{TOGETHER} {KEEP}", RECOMPUTE, f"{TOGETHER} {RECOMPUTE}")


def run(config: Config, elastic: Subnet) -> tuple[list[str], dict[str, Any]]:
    """Predict a step with each choice of `performance` options.

    Returns:
        Lines with a table in Markdown, and the figures by choice, see `figures_of`.
    """
    summary = {
        choice or "default": figures_of(override(config, choice.split()), elastic) for choice in CHOICES
    }
    head = ("`performance` options", *summary["default"])
    lines = [[f"`{choice}`", *map(str, figures.values())] for choice, figures in summary.items()]
    about = "a model, not a measurement: milliseconds of a step, and gigabytes at its peak"
    return [about, *markdown(head, lines).splitlines()], summary


def figures_of(config: Config, elastic: Subnet) -> dict[str, float]:
    """Milliseconds with an elastic student by GPU, gigabytes at the peak with this and the extreme ones."""
    space = config.method.backbone.space
    costs = step_costs(config, elastic, list(KNOWN.values()))
    students = dict.fromkeys((space.smallest, elastic, space.intact))
    milliseconds = (1e3 * sum(cost.seconds for cost in of_gpu) for of_gpu in costs)
    peaks = (predict_memory(config, elastic=student).peak / 1e9 for student in students)
    names = [*(f"{gpu.upper()}, ms" for gpu in KNOWN), *(f"{student}, GB" for student in students)]
    return {name: round(value, 1) for name, value in zip(names, [*milliseconds, *peaks], strict=True)}
