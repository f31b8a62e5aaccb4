"""The demonstration: one run on digits, then every subnet extracted and evaluated.

Shows that one pre-training run yields usable models of all sizes. Digits are easy: raw pixels score higher
than any of these models under k-NN, so their figure is printed beside.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from poa.checkpoint import RunFolder
from poa.config import Config
from poa.distributed import World
from poa.drawing import require_matplotlib
from poa.evaluate import REPORTED_K, Origin, Report, evaluate_subnets
from poa.export import extract
from poa.files import write_json
from poa.report import write_report
from poa.step import initial_network
from poa.train import pretrain


def quickstart(config: Config, out: Path) -> None:
    """Pre-train, extract and evaluate all subnets, write `summary.json` and a plot, print a table."""
    require_matplotlib()
    started = time.perf_counter()
    pretrain(config, out)
    folder = RunFolder(out)
    network, checkpoint = folder.network("teacher")
    backbone = network.backbone
    subnets = list(backbone.space)
    method, source = config.method, str(checkpoint.path)
    models = [
        extract(backbone, s, out / "models", method.crops, canvas=method.canvas, source=source)
        for s in subnets
    ]
    data = config.open()
    initial = initial_network(config).backbone
    world = World(0, 1, torch.device("cpu"))
    origin = Origin.of(folder, checkpoint, "teacher")
    scored = evaluate_subnets(backbone, subnets, data, config, world, origin, initial=initial, baselines=True)
    *_, report = scored
    report.write(out / "evaluation.json")
    report.plot(out / "accuracy.png")
    write_report([folder], out / "report.html")
    write_json(out / "summary.json", _summary(report, time.perf_counter() - started))
    print(report.table())
    pages = [out / name for name in ("evaluation.json", "accuracy.png", "summary.json")]
    print("\n".join(str(path) for path in [checkpoint.path, folder.metrics, *models, *pages]))
    print(f"open {out / 'report.html'}")


def _summary(report: Report, seconds: float) -> dict[str, object]:
    rows = [
        {
            "width": s.subnet.width,
            "depth": s.subnet.depth,
            "params": s.parameters,
            "knn": s.values["knn"][REPORTED_K],
            "knn_init": s.values["knn_init"][REPORTED_K],
        }
        for s in report.scores
    ]
    pixels = report.baselines["pixels"]["knn"][REPORTED_K]
    return {"subnets": rows, "raw_pixels_knn": pixels, "seconds": seconds}
