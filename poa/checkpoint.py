"""The folder of a run: its configuration, its metrics and its checkpoint.

    config.json       the resolved configuration
    metrics.jsonl     a line per logged step and per evaluation
    checkpoint.pt     everything needed to go on, or to extract and evaluate subnets

Files are replaced atomically. Loading reads weights and plain values only, never pickled code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poa.config import Config
from poa.errors import InputError
from poa.options import first_difference, from_dict, to_dict
from poa.tribranch import Network
from poa.weights import load_strictly, read_weights

FORMAT = "poa-checkpoint-1"


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of a run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def create(self, config: Config) -> None:
        """Make the folder of a new run; refuse one with a checkpoint, start a run without one again."""
        if self.checkpoint.exists():
            raise InputError(
                f"out: expected a new folder, got {self.path}, which holds a run; "
                f"continue it with --resume {self.path}"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.metrics.unlink(missing_ok=True)
        write_json(self.path / "config.json", to_dict(config))

    def config(self) -> Config:
        """The configuration the run was started with."""
        file = self.path / "config.json"
        try:
            return from_dict(Config, json.loads(file.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"run: expected a run folder, got {self.path}: no config.json") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{file}: expected JSON, got: {error}") from None

    def save(self, state: Mapping[str, Any], config: Config) -> None:
        """Replace the checkpoint."""
        content = {"format": FORMAT, "config": to_dict(config), **state}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, self.checkpoint)

    def load(self, config: Config, *, mapped: bool = False) -> dict[str, Any]:
        """Read the checkpoint of this configuration.

        Args:
            config: its `method` must be the checkpoint's.
            mapped: leave the tensors in the file until they are used.

        Raises:
            InputError: none there, not readable as weights, or of another `method`.
        """
        content = read_checkpoint(self.checkpoint, mapped=mapped)
        theirs = from_dict(Config, content["config"])
        if difference := first_difference(config.method, theirs.method):
            raise InputError(
                f"{self.checkpoint}: expected a checkpoint of this configuration, got another: "
                f"method.{difference} in the checkpoint"
            )
        return content

    def network(self, branch: str = "teacher") -> Network:
        """The trained teacher or student, on the CPU, in evaluation mode."""
        config = self.config()
        network = Network(config.method.backbone, config.method.head)
        load_strictly(network, self.load(config, mapped=True)[branch], str(self.checkpoint))
        return network.eval()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines of steps that are about to be repeated."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        replace_text(self.metrics, "".join(kept))


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint file without running anything in it."""
    content = read_weights(path, mapped=mapped)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
