"""Speed and memory of `poa.embed` against timm's own loop, on the same model and images.

    python -m benchmarks.embedding IMAGES [COUNT]

IMAGES holds at least COUNT (default 20,000) images, as a folder or shards. Both decode in the process that
computes, in one thread, and take turns; timm's loop is its `ImageDataset`, its transform and a DataLoader.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import poa
from poa.data.sources import open_parts
from poa.presets import preset

TURNS = 3
BATCH = 256


def main(name: str, count: int, folder: Path) -> None:
    """Print images per second of both, the largest difference, and how the memory grew."""
    import timm  # optional

    torch.set_num_threads(1)
    out = folder / "ours.npy"
    method = preset("small-images").method
    backbone = method.backbone.build(torch.Generator().manual_seed(0))
    path = poa.export.extract(backbone, backbone.space.intact, folder, method.crops, canvas=method.canvas)
    model, theirs = poa.load(path), timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    few, images = spread(name, -(-count // 10), folder / "few"), spread(name, count, folder / "images")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    ours = partial(poa.embed, model, workers=0, batch_size=BATCH, device="cpu", threads=1)
    ours(few, out=out)
    before = peak()
    ours(images, out=out)
    grown = peak() - before
    rates: dict[str, list[float]] = {"poa": [], "timm": []}
    for _ in range(TURNS):
        start = time.perf_counter()
        ours(images, out=out)
        rates["poa"].append(count / (time.perf_counter() - start))
        start = time.perf_counter()
        features = timm_features(theirs, images, transform)
        rates["timm"].append(count / (time.perf_counter() - start))
    difference = float(np.abs(np.load(out) - features).max())
    rate, peer = (float(np.median(values)) for values in rates.values())
    speeds = f"poa.embed {rate:,.0f} img/s, timm's loop {peer:,.0f} img/s ({rate / peer:.2f}x)"
    print(f"{count:,} images: {speeds}; largest difference {difference:.3f}")
    print(f"peak memory of poa.embed grew by {grown:.1f} MiB from a tenth of the images to all")


def spread(name: str, count: int, folder: Path) -> Path:
    """The first images of a source, as files."""
    folder.mkdir()
    left = count
    for part in open_parts(name, 1.0)[0]:
        for index in range(min(left, len(part.images))):
            with part.images.open(index) as file:  # type: ignore[union-attr]
                (folder / f"{left - index:06}.jpg").write_bytes(file.read())
        left -= min(left, len(part.images))
    assert not left, f"expected {count:,} images in {name}, {left:,} are missing"
    return folder


@torch.inference_mode()
def timm_features(model: torch.nn.Module, images: Path, transform: object) -> np.ndarray:
    """Those of timm's loop."""
    from timm.data import ImageDataset

    loader = torch.utils.data.DataLoader(ImageDataset(str(images), transform=transform), batch_size=BATCH)
    return np.concatenate([model(batch).numpy() for batch, _ in loader])


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20_000, Path(scratch))
