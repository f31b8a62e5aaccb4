"""`PYTHONPATH=tests python -m helpers.damage COUNT [SEED]`: so many damages to each kind of file of a run.

Each must be named or change nothing that is read; none may end in anything but an `InputError`.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import poa
from helpers.collections_of_images import write_parquet, write_shards
from helpers.tiny import OVERRIDES
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.data.inspect import inspect
from poa.data.sources import open_data
from poa.errors import InputError
from poa.evaluate import evaluation_file
from poa.report import evaluations, summary
from poa.selection.latency import Latency, LatencyTable, Setting
from poa.selection.quality import Weights, knn_quality
from poa.subnets import Subnet

LATENCIES = LatencyTable(
    Setting("cpu", "a CPU", 4, 1, 24, "torch", "PyTorch 2"),
    {Subnet(width, depth): Latency(1.0 * depth, 1.5 * depth, 0.5) for width in (16, 32) for depth in (1, 2)},
    0.1,
    {"subnets": 3, "median": 0.01, "largest": 0.02},
)
TABLE = repr(LATENCIES)
WORDS = (b"0", b"-1", b"1e999", b"null", b"[]", b"{}", b'"x"', b"NaN", b"\xff\xfe", b"\n", b'"', b"[" * 5000)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, a part lost, zeroed, doubled, overwritten or put in; as disks and hands do it."""
    start = draw.randrange(len(content))
    end = min(start + draw.choice((1, 1, 1, 7, 64, 4096)), len(content))
    part, noise = content[start:end], draw.randbytes(end - start)
    inside = draw.choice(
        (
            *(bytes([part[0] ^ 1 << draw.randrange(8)]) + part[1:], b"%d" % draw.randrange(10), b" "),
            *(b"", bytes(len(part)), part + part, noise, noise + part, draw.choice(WORDS)),
        )
    )
    whole = content[:start] + inside + content[end:]
    return draw.choice((*[whole] * 12, content[:start], b""))


class Notes(logging.Handler):
    """The messages of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def example(folder: Path) -> Path:
    """A tiny run with everything that can be damaged; and its data, a shard of twelve images."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image := BytesIO(), "PNG")
            for name, content in (
                (f"{number:03}.png", image.getvalue()),
                (f"{number:03}.cls", b"%d" % (number % 2)),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    run, data = str(folder / "run"), str(folder / "a.tar")
    with redirect_stdout(StringIO()):
        assert main(["pretrain", "--out", run, "--data", data, *OVERRIDES]) == 0
        assert main(["extract", run, "--subnets", "16x1"]) == 0
        assert main(["evaluate", run, "--subnets", "16x1", "--device", "cpu"]) == 0
    LATENCIES.write(folder / "run" / "latency-cpu.json")
    return folder / "run"


class Readers:
    """How each kind of file is read; the answer says how the damage was met."""

    def __init__(self, run: Path, cache: Path, notes: Notes):
        self.run, self.notes = RunFolder(run), notes
        self.model = run / "models" / "vit-16x1"
        self.rows, self.config = self.run.rows(), self.run.config()
        self.info = poa.load(self.model).info
        self.names = self._names()
        shard = next(write_shards(run.parent / "shards", 8).iterdir())
        table = next(write_parquet(run.parent / "tables", 8).iterdir())
        self.files: dict[str, tuple[Path, Callable[[], str]]] = {
            "checkpoint": (self.run.checkpoints()[-1].path, self.read_checkpoint),
            "export, weights": (self.model / "model.safetensors", self.read_export),
            "export, JSON": (self.model / "config.json", self.read_export),
            "config": (run / "config.json", self.read_config),
            "metrics": (self.run.metrics, self.read_metrics),
            "evaluation": (run / "evaluation.json", self.read_evaluation),
            "latency": (run / "latency-cpu.json", self.read_latency),
            "cache": (next(cache.rglob("*.npz")), self.read_cache),
            "shard": (shard, lambda: self.read_images(shard)),
            "Parquet": (table, lambda: self.read_images(table)),
        }

    def read_checkpoint(self) -> str:
        _, used = self.run.network()
        assert used.step == 3 and any("is damaged" in line for line in self.notes.lines)
        return "fell back"

    def read_export(self) -> str:
        assert poa.load(self.model).info == self.info
        return "the same"

    def read_config(self) -> str:
        config = self.run.config()
        if config == self.config:
            return "the same"
        self.run.load(self.run.newest(), config)  # refuses another method
        optim = replace(config.method, optim=self.config.method.optim, micro_batches=None)
        assert optim == replace(self.config.method, micro_batches=None)
        return "as if edited"

    def read_metrics(self) -> str:
        rows = self.run.rows()
        assert all(any({**row, **mine} == row for mine in self.rows) for row in rows)
        if any("loss" in row for row in rows):
            summary(rows)
        if len(rows) == len(self.rows):
            return "the same"
        if not self.notes.lines:  # cut between lines, which a resume says, or lines twice
            self.run.forget_metrics_after(self.rows[-1]["step"])
            assert self.notes.lines or len(rows) > len(self.rows)
            return "cut between lines" if self.notes.lines else "lines twice"
        return "lines named"

    def read_evaluation(self) -> str:
        evaluations(self.run)
        with suppress(InputError):
            knn_quality(Weights(self.run, "teacher", None), None, self.config.data.source)
        step = self.run.newest().step
        path = evaluation_file(self.run.path, self.config.data.source, "teacher", step)
        return "the same place" if path.name == "evaluation.json" else "kept, another beside it"

    def read_latency(self) -> str:
        table = LatencyTable.read(self.run.path / "latency-cpu.json", self.config.method.backbone.space)
        return "the same" if repr(table) == TABLE else "as if edited"

    def _names(self) -> list[str]:
        data = open_data(self.config.data.source, 0.25, 0).train
        return [f"{data.storage.name(int(p))} {data.labels}" for p in data.positions]

    def read_images(self, path: Path) -> str:
        """Of three classes with two images each; an image that is lost must be spoken of."""
        data = open_data(str(path), 0, 0)
        looks = inspect(data.train, 0)
        if len(looks.sizes) + len(looks.unreadable) < 6:
            assert str(data.left_out) or data.lost or self.notes.lines, data
            return "fewer, said"
        if looks.unreadable:
            return "unreadable, named"
        labels = data.train.labels
        same = labels is not None and labels.tolist() == [0, 0, 1, 1, 2, 2]
        return "the same" if same else "as if edited"

    def read_cache(self) -> str:
        assert self._names() == self.names
        return "the same"


def tried(kind: str, readers: Readers, draw: random.Random) -> str:
    """How one damage to a kind of file was met."""
    path, read = readers.files[kind]
    content = path.read_bytes()
    while (other := damaged(content, draw)) == content:
        pass
    readers.notes.lines.clear()
    path.write_bytes(other)
    try:
        return read()
    except InputError as error:
        assert "\n" not in str(error), error
        return "refused"
    finally:
        path.write_bytes(content)


def readers_of(folder: Path, monkey: Callable[[str, str], Any]) -> Readers:
    """The readers of an example in a folder, after `monkey` set the environment."""
    monkey("XDG_CACHE_HOME", str(folder / "cache"))
    notes = Notes()
    logging.getLogger("poa").addHandler(notes)
    return Readers(example(folder), folder / "cache", notes)


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    logging.getLogger("poa").propagate = False
    place = Path(tempfile.mkdtemp())
    examples = readers_of(place, os.environ.__setitem__)
    for name in examples.files:
        dice = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
        counts = Counter(tried(name, examples, dice) for _ in range(int(sys.argv[1])))
        print(f"{name:>16}: {json.dumps(counts)}", flush=True)
    shutil.rmtree(place)
