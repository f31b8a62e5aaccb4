"""The folder of a run: its configuration, its metrics and its checkpoints.

    config.json                               the configuration
    beginning.json                            the first lines of the run: images found, plan
    order.json                                the order of sorted pretrained weights, if any
    metrics.jsonl                             a line per logged step, evaluation and alarm, with its checksum
    unreadable.jsonl                          a line per image that could not be read, if any
    lock                                      the process that trains, while it does
    checkpoints/00001000-0123456789abcdef.pt  everything needed to resume, or to extract and evaluate subnets

The name of a checkpoint is its step and the beginning of its SHA-256, so that one atomic renaming makes it
whole and findable, and a damaged one is noticed. Loading reads weights and plain values only, never pickled
code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from poa.classifier import Classifier
from poa.config import Config
from poa.errors import DivergenceError, InputError, SaveError, one_line
from poa.files import (
    append_rows,
    make_folder,
    open_regular,
    read_json,
    read_rows,
    remove_partial,
    sealed,
    sync,
    write_json,
    write_text,
    writing,
)
from poa.lock import RunLock
from poa.network import Network
from poa.optim import FIXED, OptimConfig
from poa.options import first_difference, from_dict, to_dict
from poa.version import VERSION
from poa.weights import load_strictly, read_weights

Branch = Literal["teacher", "student"]
SCHEDULES = [f"optim.{f.name}" for f in dataclasses.fields(OptimConfig) if f.name not in FIXED]
FORMAT, FINE_TUNED = "poa-checkpoint-2", "poa-classifier-1"
KINDS = {FORMAT: "pre-training", FINE_TUNED: "fine-tuning"}
SHARED: dict[str, type] = {
    **dict.fromkeys(("step", "processes", "unreadable"), int),
    **dict.fromkeys(("config", "student", "teacher", "optimizer", "scaler"), dict),
    "skipped": list,
}
CONTENT: dict[str, dict[str, type]] = {
    FORMAT: SHARED | {"plan": dict, "watch": dict, "centers": list},
    FINE_TUNED: SHARED | {"finetune": dict, "classes": list, "best": dict},
}
DIGITS = 16  # of the checksum in a name
NAME = re.compile(rf"(\d{{8,}})-([0-9a-f]{{{DIGITS}}})\.pt")
DAMAGED = ".damaged"

log = logging.getLogger("poa")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint file, known by its name."""

    step: int
    path: Path
    checksum: str

    def damage(self) -> str | None:
        """What is wrong with the file, if anything. Raises FileNotFoundError: a run has deleted it."""
        digest, size = hashlib.sha256(), 0
        try:
            with open_regular(self.path) as file:
                while part := file.read(1 << 20):
                    digest.update(part)
                    size += len(part)
        except FileNotFoundError:
            if self.path.is_symlink():
                return "is a link to nothing"
            raise
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        got = digest.hexdigest()[:DIGITS]
        if got == self.checksum:
            return None
        return f"is damaged: expected checksum {self.checksum}, got {got} of {size:,} bytes"


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of a run; nothing is written without the lock of the run that writes into it."""

    path: Path
    lock: RunLock | None = None

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def unreadable(self) -> Path:
        return self.path / "unreadable.jsonl"

    @property
    def finetuning(self) -> Path:
        """The options of fine-tuning."""
        return self.path / "finetune.json"

    @property
    def _store(self) -> Path:
        return self.path / "checkpoints"

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints by step, whole or not."""
        names = [NAME.fullmatch(path.name) for path in self._store.glob("*.pt")]
        return sorted(Checkpoint(int(m[1]), self._store / m[0], m[2]) for m in names if m)

    def require_new(self) -> None:
        """Raise InputError, and write nothing, where there is a checkpoint, or can be no folder."""
        if self.checkpoints():
            raise InputError(
                f"out: expected a new folder, got {self.path}, which holds a run; "
                f"resume it with --resume {shlex.quote(str(self.path))}"
            )
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "is not writable" if there.is_dir() else "is a file"
            raise InputError(f"out: expected a folder, got {self.path}: {there} {why}")

    def create(self, config: Config) -> None:
        """Make the folder of a new run, or start one without a checkpoint again; see `require_new`."""
        self.require_new()
        make_folder(self._store, "out")
        self.remove_partial()
        self.metrics.unlink(missing_ok=True)
        self.unreadable.unlink(missing_ok=True)
        write_json(self.path / "config.json", to_dict(config))

    def keep_config(self, config: Config) -> None:
        """Let the run resume with other schedules than it was started with."""
        if config.method.optim != self.config().method.optim:
            optim = config.method.optim
            kept = self.config()
            kept = dataclasses.replace(kept, method=dataclasses.replace(kept.method, optim=optim))
            write_json(self.path / "config.json", to_dict(kept))

    def keep_beginning(self, said: Sequence[str], phases: Mapping[str, int]) -> None:
        """Keep what the run says at its beginning, and the steps of its phases, for reports."""
        about = {"version": VERSION, "said": said, "phases": phases}
        write_json(self.path / "beginning.json", about)

    def keep_order(self, order: Mapping[str, Any]) -> None:
        """Keep the order into which pretrained weights were sorted."""
        write_json(self.path / "order.json", dict(order))

    def order(self) -> dict[str, Any] | None:
        """The order of `keep_order`, if weights were sorted."""
        file = self.path / "order.json"
        return read_json(file, "run: expected an order in JSON") if file.is_file() else None

    def config(self) -> Config:
        """The configuration the run was started with."""
        file = self.path / "config.json"
        if not file.is_file():
            raise InputError(f"run: expected a run folder, got {self.path}: no config.json")
        content = read_json(file, "run: expected a configuration in JSON")
        if isinstance(content, dict) and "poa" in content:
            raise InputError(f"run: expected a run folder, got {self.path}: an extracted model")
        try:
            return from_dict(Config, content)
        except InputError as error:
            raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None

    def save(self, state: Mapping[str, Any], config: Config, kept: int | None = None) -> None:
        """Write the checkpoint of `state["step"]` and delete those that need not be kept, but never that of
        step `kept`.

        The state has a format where that is not of pre-training. Raises SaveError: it could not be written;
        those before are there still.
        """
        content = {"format": FORMAT, "config": to_dict(config), **state}
        step = state["step"]
        try:
            self._require_lock()
            sync(self.metrics)
            with writing(self._store / f"{step:08}") as file:
                torch.save(content, file)  # type: ignore[arg-type]
                checksum = file.digest.hexdigest()[:DIGITS]
                file.path = self._store / f"{step:08}-{checksum}.pt"
        except OSError as error:
            reason = f"{one_line(error.__cause__ or error)}; {self._newest_in_words()}"
            raise SaveError(f"the checkpoint of step {step} was not written: {reason}") from error
        self._delete_old(Checkpoint(step, file.path, checksum), config, kept)

    def require_finite(self, step: int, networks: Sequence[torch.nn.Module], rate: str) -> None:
        """Raise DivergenceError where weights of networks are NaN or inf, in all processes alike; waits for
        the device.

        `rate` is the name of the option to lower.
        """
        weights = [p.detach() for network in networks for p in network.parameters()]
        if not torch.stack(torch._foreach_norm(weights, math.inf)).isfinite().all():
            raise DivergenceError(
                f"step {step}: weights are NaN or inf, though gradients were finite; no checkpoint was "
                f"saved, {self._newest_in_words()}; lower {rate}"
            )

    def _newest_in_words(self) -> str:
        before = self.checkpoints()
        return f"that of step {before[-1].step} is the newest" if before else "there is none yet"

    def _require_lock(self) -> None:
        if self.lock:
            self.lock.require()

    def remove_partial(self) -> None:
        """Remove what a run that was killed left of what it was writing."""
        for name in ("config.json", self.metrics.name):
            remove_partial(self.path, name)
        remove_partial(self._store)

    def _delete_old(self, newest: Checkpoint, config: Config, best: int | None) -> None:
        """Keep the newest checkpoints, milestones and the best."""
        steps = sorted({c.step for c in self.checkpoints()})
        kept = {*steps[-config.run.keep_last :], best}
        if config.run.keep_every:
            kept |= {step for step in steps if step % config.run.keep_every == 0}
        for checkpoint in self.checkpoints():
            again = checkpoint.step == newest.step and checkpoint != newest
            if checkpoint.step not in kept or again:
                checkpoint.path.unlink(missing_ok=True)

    def newest(self, step: int | None = None) -> Checkpoint:
        """The newest whole checkpoint, or that of a step; warns of damaged ones. Raises InputError: none."""
        candidates = [c for c in self.checkpoints() if step is None or c.step == step]
        damages: list[str] = []
        for checkpoint in reversed(candidates):
            try:
                damage = checkpoint.damage()
            except FileNotFoundError:
                return self.newest(step)
            if damage is None:
                for line in damages:
                    log.warning("%s; using the checkpoint of step %d", line, checkpoint.step)
                return checkpoint
            damages.append(f"{checkpoint.path} {damage}")
        steps = ", ".join(str(c.step) for c in self.checkpoints()) or "none"
        which = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        got = "; ".join(damages) or f"checkpoints of steps: {steps}"
        if not self.checkpoints():
            got += "; if the run has ended, start it again with --out"
        raise InputError(f"{self.path}: expected {which}, got {got}")

    def take_up(self, step: int) -> None:
        """Go on from a step: forget what a run that was killed left unfinished, and lines of later steps.

        Checkpoints of those, which are damaged, are renamed, so that they are not asked for again.
        """
        self.remove_partial()
        for checkpoint in self.checkpoints():
            if checkpoint.step > step:
                checkpoint.path.rename(checkpoint.path.with_suffix(DAMAGED))
        self.forget_metrics_after(step)

    def load(
        self, checkpoint: Checkpoint, config: Config, *, mapped: bool = False, format: str | None = FORMAT
    ) -> dict[str, Any]:
        """Read a checkpoint of this configuration.

        Args:
            checkpoint: see `newest`.
            config: its `method` must be the checkpoint's, apart from `micro_batches` and, as they may be
                recomputed, the schedules.
            mapped: leave the tensors in the file until they are used.
            format: of pre-training or of fine-tuning; None: either.

        Raises:
            InputError: not readable as weights, or of another `method` or format.
        """
        content = read_checkpoint(checkpoint.path, mapped=mapped)
        if format not in (None, content["format"]):
            raise InputError(
                f"{checkpoint.path}: expected a checkpoint of {KINDS[format]}, got one of "
                f"{KINDS[content['format']]}"
            )
        theirs = from_dict(Config, content["config"])
        if difference := first_difference(
            config.method, theirs.method, leave_out=("micro_batches", *SCHEDULES)
        ):
            raise InputError(
                f"{checkpoint.path}: expected a checkpoint of this configuration, got another: "
                f"method.{difference} in the checkpoint"
            )
        return content

    def is_fine_tuned(self) -> bool:
        return bool(read_checkpoint(self.newest().path, mapped=True)["format"] == FINE_TUNED)

    def network(
        self, branch: Branch = "teacher", step: int | None = None
    ) -> tuple[Network | Classifier, Checkpoint]:
        """The trained teacher (of fine-tuning: the moving average) or student, and where it comes from.

        It is on the CPU, in evaluation mode. Raises InputError: no such branch or checkpoint.
        """
        if branch not in get_args(Branch):
            raise InputError(f"branch: expected {' or '.join(get_args(Branch))}, got {branch!r}")
        config = self.config()
        while True:
            checkpoint = self.newest(step)
            try:
                content = self.load(checkpoint, config, mapped=True, format=None)
                break
            except InputError:
                if checkpoint.path.exists():
                    raise  # otherwise a run that trains has deleted it, and there is a newer one
        network: Network | Classifier
        if content["format"] == FINE_TUNED:
            network = Classifier(config.method.backbone, content["classes"])
        else:
            network = Network(config.method.backbone, config.method.head)
        load_strictly(network, content[branch], str(checkpoint.path))
        return network.eval(), checkpoint

    def log(self, row: Mapping[str, Any]) -> None:
        self._require_lock()
        append_rows(self.metrics, [row])

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the metrics; damaged ones are named and left out."""
        return read_rows(self.metrics, "step", int)

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines of steps that are about to be repeated."""
        kept = [row for row in self.rows() if row["step"] <= step]
        last = max((row["step"] for row in kept), default=0)
        if last < step:  # as the line of a step is written before its checkpoint
            log.warning("%s: expected lines up to step %d, got them up to step %d", self.metrics, step, last)
        write_text(self.metrics, "".join(json.dumps(sealed(row)) + "\n" for row in kept))


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint file without running anything in it."""
    content = read_weights(path, mapped=mapped)
    if not isinstance(content, dict) or content.get("format") not in CONTENT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: expected a checkpoint of format {FORMAT} or {FINE_TUNED}, got {got}")
    for name, kind in CONTENT[content["format"]].items():
        if not isinstance(content.get(name), kind):
            got = type(content[name]).__name__ if name in content else "nothing"
            raise InputError(f"{path}: expected a checkpoint with {name} ({kind.__name__}), got {got}")
    return content
