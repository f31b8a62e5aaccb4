"""Features of all images of a source by one model, in order, in memory that does not grow with them.

Each rank computes every n-th batch, and the main process gathers a batch of each and writes them one after
the other. So the order of the images is kept, and no rank but the main one writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from poa.data.layout import Images, Openers, named
from poa.data.loader import EVALUATION_BATCH, evaluation_batches
from poa.data.preprocessing import Preprocessing
from poa.data.sources import ImageSource, open_parts
from poa.data.summary import LeftOut
from poa.distributed import World, init_distributed
from poa.embedding.files import Rows, require_feature_file, writing_features
from poa.embedding.nearest import Nearest
from poa.errors import InputError
from poa.export import ExportedModel
from poa.images import main_first
from poa.plan import counted
from poa.progress import Progress

TOKENS = ("cls", "mean", "patches")
"""The class token `[C]`, the mean of the patch tokens `[C]`, the patch tokens `[P, C]`."""
SHOWN_EVERY = 10.0  # seconds between lines of progress


@dataclass(frozen=True, repr=False)
class Embeddings:
    """Features of the readable images of a source, in their order; `features["cls"]` gives those of a token.

    Attributes:
        count: of images.
        left_out: images that could not be read, and what else is not among them.
        images_per_s: how fast they were computed.
        out: the file that has all of them; None where they are here.
        names, labels: of the images; empty where `out` has them.
        features: float32 `[images, ...]` by token; empty where `out` has them.

    Example:
        >>> import poa
        >>> poa.embed(poa.load("runs/first", "16x1"), "digits", workers=0)["cls"].shape
        (1797, 16)
    """

    count: int
    left_out: LeftOut
    images_per_s: float
    out: Path | None = None
    names: Sequence[str] = ()
    labels: Sequence[str | None] = ()
    features: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, token: str) -> np.ndarray:
        return self.features[token]

    def __repr__(self) -> str:
        lines = [f"left out: {self.left_out}"] if self.left_out else []
        lines += [f"{token}: {list(values.shape)}" for token, values in self.features.items()]
        return "\n".join([*lines, f"{counted(self.count, 'image')}, {self.images_per_s:,.0f} img/s"])


def embed(
    model: ExportedModel,
    data: Images,
    *,
    out: str | Path | None = None,
    tokens: Sequence[str] = ("cls",),
    nearest: Nearest | None = None,
    device: str = "auto",
    workers: int = 4,
    batch_size: int = EVALUATION_BATCH,
    threads: int | None = None,
) -> Embeddings:
    """Compute the features of all images of a source, training and test images alike.

    Args:
        model: a subnet.
        data: a path, as `--data` takes it, or a dataset; see `poa.pretrain`.
        out: file to write them to, `.npz`, `.npy` or `.parquet`; default: they stay in memory.
        tokens: which features, some of `TOKENS`.
        nearest: queries, whose neighbours are looked for.
        device: auto, cpu, cuda or cuda:N.
        workers: processes that decode images.
        batch_size: images that a rank computes at a time.
        threads: CPU threads; see `performance.threads`.

    Raises:
        InputError: wrong tokens, images, device or file.
        SaveError: the file system refused something; there is no file then.

    Example:
        >>> import poa
        >>> embeddings = poa.embed(poa.load("runs/first"), "digits", tokens=["cls", "mean"], workers=0)
        >>> embeddings["mean"].shape, embeddings.names[0], embeddings.labels[0]
        ((1797, 32), 'image 0', '0')
    """
    unknown = [token for token in tokens if token not in TOKENS]
    if unknown or not tokens:
        raise InputError(f"--tokens: expected any of {', '.join(TOKENS)}, got {', '.join(unknown) or 'none'}")
    path = Path(out) if out else None
    name, openers = named(data)
    with init_distributed(device, threads=threads) as world, torch.inference_mode():
        if path:
            world.from_main(partial(require_feature_file, path, len(tokens)))
        sources, left_out = _opened(name, openers, model.preprocess, world)
        model, kept = model.to(world.device).eval(), list[Rows]()
        if nearest:
            nearest.begin(model)
        about = {"model": model.info | {"sha256": model.sha256()}, "data": name}
        writes = writing_features(path, about) if path and world.is_main else nullcontext(kept.append)
        with Progress(sum(map(len, sources)), 0, world.is_main, "image") as progress, writes as add:
            work = _Work(add, tokens, progress, left_out, nearest)
            for source in sources:
                for batch in _gathered(model, source, world, work.needed, workers, batch_size):
                    work.take(source, batch)
            if world.is_main and not work.count:
                raise InputError(f"data: expected readable images, got none of {name} ({left_out})")
    names = [name for rows in kept for name in rows.names]
    labels = [label for rows in kept for label in rows.labels]
    features = {t: np.concatenate([rows.features[t] for rows in kept]) for t in (tokens if kept else ())}
    return Embeddings(work.count, left_out, work.images_per_s, path, names, labels, features)


def _opened(
    name: str, openers: Openers | None, preprocess: Preprocessing, world: World
) -> tuple[list[ImageSource], LeftOut]:
    """All images of a name, and what is not among them."""
    opened, lost, left_out = main_first(partial(open_parts, name, 1.0, openers), name, world)
    for line in lost:
        left_out.add("folders or shards, missing or damaged", line)
    bits, channels = preprocess.bits, preprocess.channels
    sources = [replace(ImageSource.whole(part), bits=bits, channels=channels) for part in opened]
    world.require_same("data", {"images": sum(map(len, sources)), "missing": len(lost)})
    return sources, left_out


@dataclass
class _Work:
    """Where the features of batches go, on the main process, and how fast."""

    add: Callable[[Rows], None]
    tokens: Sequence[str]
    progress: Progress
    left_out: LeftOut
    nearest: Nearest | None
    count: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        self.needed = list(dict.fromkeys([*self.tokens, *(["cls"] if self.nearest else [])]))
        self.started = self.shown = time.perf_counter()

    @property
    def images_per_s(self) -> float:
        return self.done / (time.perf_counter() - self.started)

    def take(self, source: ImageSource, batch: Batch) -> None:
        positions = batch.positions.tolist()
        for line in batch.unreadable:
            self.left_out.add("unreadable", line)
        if positions:
            names = [source.name(i).encode("utf-8", "backslashreplace").decode() for i in positions]
            features = {token: batch.features[token].numpy() for token in self.tokens}
            self.add(Rows(names, [source.label(i) for i in positions], features))
            if self.nearest:
                self.nearest.add(source, positions, batch.features["cls"])
        self.count += len(positions)
        self.done += len(positions) + len(batch.unreadable)
        self.progress.step(len(positions) + len(batch.unreadable))
        if (now := time.perf_counter()) - self.shown > SHOWN_EVERY:
            self.progress.show(self.done, {"speed": f"{self.images_per_s:,.0f} img/s"})
            self.shown = now


class Batch(NamedTuple):
    """What ranks computed of some images: positions int64 `[images]` in the source, features float32
    `[images, ...]` by token, and messages about those that cannot be read."""

    positions: Tensor
    features: dict[str, Tensor]
    unreadable: list[str]


def _own(
    model: ExportedModel, source: ImageSource, world: World, workers: int, batch_size: int
) -> Iterator[Batch]:
    """Every n-th batch of a source, of n ranks."""
    starts = range(world.rank * batch_size, len(source), world.size * batch_size)
    every = np.arange(len(source))
    mine = np.concatenate([every[:0], *(every[start : start + batch_size] for start in starts)])
    pixels = model.preprocess
    for read in evaluation_batches(source.subset(mine), pixels.canvas, workers, batch_size, world.timeout):
        features = {}
        if len(read.images):
            images = pixels.crop(read.images.to(world.device, non_blocking=True), read.sizes)
            tokens = model.backbone([images])[0]
            features = {"cls": tokens.cls, "mean": tokens.patches.mean(1), "patches": tokens.patches}
        yield Batch(torch.from_numpy(mine)[read.positions], features, read.unreadable)


def _gathered(
    model: ExportedModel,
    source: ImageSource,
    world: World,
    tokens: Sequence[str],
    workers: int,
    batch_size: int,
) -> Iterator[Batch]:
    """A batch of every rank, in order, on the main process; empty ones on the others."""
    none = Batch(torch.zeros(0, dtype=torch.int64), {}, [])
    batches = chain(_own(model, source, world, workers, batch_size), repeat(none))
    for _ in range(0, len(source), world.size * batch_size):
        positions, features, unreadable = next(batches)
        rows = [features[token].cpu() if features else torch.zeros(0) for token in tokens]
        gathered = [world.gather_rows(part) for part in (positions, *rows)]
        failed = sum(world.gather(unreadable), [])
        if world.is_main:
            first, *rest = (part for part in gathered if part is not None)
            yield Batch(first, dict(zip(tokens, rest, strict=True)), failed)
