"""Where the figures of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from poa.config import Destination
from poa.errors import InputError
from poa.files import write_text


class Writer(Protocol):
    """Somewhere figures go, besides `metrics.jsonl`."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures after a step, by dotted names."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases named as the folder; a resumed one keeps its identity."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        file = folder / "wandb.id"
        if not file.exists():
            write_text(file, wandb.util.generate_id())
        name = folder.resolve().name
        self.run = wandb.init(
            project="poa", name=name, dir=folder, id=file.read_text(), resume="allow", config=dict(config)
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


def require_writers(names: tuple[Destination, ...]) -> None:
    """Raise InputError for what is not installed, before a run begins."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"run.log_to: expected {name} to be installed; pip install {name}")


def open_writers(
    names: tuple[Destination, ...], folder: Path, config: Mapping[str, Any], first_step: int
) -> list[Writer]:
    """The writers of a run that begins after `first_step` steps."""
    made: dict[str, Any] = {
        "tensorboard": lambda: TensorBoard(folder, first_step),
        "wandb": lambda: Wandb(folder, config),
    }
    return [made[name]() for name in names]


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row by dotted names; lists give their mean and largest."""
    figures: dict[str, float] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            figures |= flat(value, f"{name}.")
        elif isinstance(value, list) and value:
            figures |= {f"{name}.mean": sum(value) / len(value), f"{name}.max": max(value)}
        elif isinstance(value, int | float):
            figures[name] = value
    return figures
