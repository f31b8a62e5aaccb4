"""Rows of measurements: what they say of where they were taken, written as JSON lines.

A row has `op`, `provider`, `mode`, `shape`, `dtype`, times in microseconds (`p20`, `p50`, `p80`) and what
follows from them, and of its place `device`, `gpu`, `driver`, `torch`, `triton`, `commit`, `date`, `tuned`:
how many settings come from a table of timed ones. Rows of `op: step` have `images_per_s`, `mfu`, `peak_mib`
and `batch`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from elastic_kernels.tuning import table_of

FOLDER = Path(__file__).parent / "results"
REQUIRED = ("op", "provider", "mode", "shape", "dtype", "device", "gpu", "driver", "torch", "commit", "date")
PACKAGES = (
    *("torch", "triton", "numpy", "torchvision", "timm", "xformers", "flash-attn", "flash-attn-4"),
    *("liger-kernel", "quack-kernels", "apex"),
)
COMMIT_VARIABLE = "BENCHMARKS_COMMIT"  # for trees that travel without their repository

Row = dict[str, Any]
WORDS = {  # of a row's figures
    "p50": lambda us: f"{us / 1e3:10.3f} ms",
    "images_per_s": lambda speed: f"{speed:9.1f} images/s",
    "gb_per_s": lambda speed: f"{speed:8.1f} GB/s",
    "tflop_per_s": lambda speed: f"{speed:7.2f} TFLOP/s",
    "mfu": lambda share: f"MFU {share:.1%}",
    "share_of_floor": lambda share: f"{share:.1%} of floor",
    "peak_mib": lambda size: f"{size:.1f} MiB",
    "graphs": lambda count: f"{count} graphs compiled" if count else "",
}


def line(row: Row) -> str:
    """A row in words."""
    figures = [words(row[name]) for name, words in WORDS.items() if row.get(name) is not None]
    return "  ".join(
        [f"{row['op']} {row['shape']}  {row['provider']:14} {row['mode']:10}", *figures]
    ).rstrip()


@functools.lru_cache
def place(device_type: str) -> Row:
    """Device, versions, number of timed settings in use, commit and date of this process."""
    triton = importlib.util.find_spec("triton") is not None
    return {
        "device": device_type,
        "gpu": torch.cuda.get_device_name() if device_type == "cuda" else "none",
        "driver": _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device_type == "cuda"
        else "none",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if triton else "none",
        "tuned": len(table_of(torch.device(device_type)) or ()) if triton else 0,
        "commit": os.environ.get(COMMIT_VARIABLE) or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that take part in measurements, as far as they are installed."""
    installed = {"python": platform.python_version(), "cpus": str(os.cpu_count())}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def clocks() -> str:
    """Of the GPU, with the limit of its power and its temperature, in words."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    return _printed("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def _commit() -> str:
    folder = str(FOLDER.parent)
    commit = _printed("git", "-C", folder, "rev-parse", "--short", "HEAD")
    dirty = _printed("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("-changed" if dirty and commit != "unknown" else "")


def _printed(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, which is made if need be; they are on disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def committed() -> list[Path]:
    """Files of rows in the folder of results."""
    return sorted([*FOLDER.glob("*.jsonl"), *FOLDER.glob("*/rows.jsonl")])


def load(paths: Iterable[Path]) -> list[Row]:
    """The rows of files.

    Raises:
        ValueError: a line is no row.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            row = json.loads(line)
            missing = [key for key in REQUIRED if key not in row]
            if missing:
                raise ValueError(
                    f"{path}:{number}: expected a row with {', '.join(missing)}, got {line[:80]}"
                )
            rows.append(row)
    return rows
