"""Latency tables: what each subnet takes on a device, measured or interpolated from a sample.

Latency is interpolated as `sum_ij c_ij w^i d_j`: linear in the blocks `d_j` of every stage that varies (and
`d_0 = 1`), quadratic in the width `w`, fitted by least squares of relative errors. The error that a table
states is that of held-out subnets: each measured one as the fit to all others predicts it, but those that lie
outside of the others (leverage above 1, or above the smallest there is).
"""

from __future__ import annotations

import html
import itertools
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from poa.config import MethodConfig
from poa.errors import InputError, as_input, optional_package
from poa.export import static_model
from poa.files import read_json, write_json
from poa.selection.runtimes import RUNTIMES, interleaved
from poa.subnets import SearchSpace, Subnet
from poa.table import Table

BUSY = 0.05  # share of disturbed calls that is worth a note
How = Literal["measured", "disturbed", "interpolated"]
DEGREE = 2  # of the polynomial in the width
R2 = (0.7548776662466927, 0.5698402909980532)  # 1/p and 1/p^2 of p^3 = p + 1


@dataclass(frozen=True)
class Setting:
    """What a latency depends on, besides the subnet: the device, `cpu`, `cuda` or a GPU's own name in
    PyTorch; the name of the machine's CPU or GPU; CPU threads of PyTorch; images and pixels of a call; one of
    `RUNTIMES`, and the version of PyTorch or onnxruntime."""

    device: str
    machine: str
    threads: int
    batch: int
    image_size: int
    runtime: str
    version: str

    @classmethod
    def of(cls, device: torch.device, batch: int, image_size: int, runtime: str) -> Setting:
        """That of this process."""
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        threads = torch.get_num_threads()
        version = f"PyTorch {torch.__version__}"
        if runtime == "onnxruntime":
            version = optional_package(runtime, "export").__version__
        return cls(str(device.type), machine, threads, batch, image_size, runtime, version)

    def name(self, trained_size: int) -> str:
        """A short one, such as `cpu`, or `cpu-4threads-batch8-compile` where it is not the usual one."""
        parts = (
            (self.device, True),
            (f"{self.threads}threads", self.device == "cpu" and self.threads > 1),
            (f"batch{self.batch}", self.batch > 1),
            (f"{self.image_size}px", self.image_size != trained_size),
            (self.runtime, self.runtime != "torch"),
        )
        return "-".join(part for part, said in parts if said)

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        images = f"batch {self.batch} of {self.image_size} px, fp32"
        return f"{self.machine}{threads}, {images}, {self.runtime} ({self.version})"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call: median, 95th percentile and the fastest.

    `how` they are known; "disturbed": measured with interruptions, as too few calls had none.
    """

    median: float
    p95: float
    fastest: float
    how: How = "measured"


@dataclass(frozen=True, repr=False)
class LatencyTable:
    """Latencies of subnets in one setting; shows itself as a table.

    Attributes:
        setting: what they depend on.
        latencies: by subnet.
        disturbed: share of calls in which other processes took a CPU away. They do not count for subnets that
            have enough others.
        error: relative errors of the medians of `subnets` held-out ones, `median` and `largest`; None where
            all are measured.
        file: in which they lie.
    """

    setting: Setting
    latencies: Mapping[Subnet, Latency]
    disturbed: float
    error: Mapping[str, float] | None = None
    file: Path | None = None

    def rows(self) -> Table:
        """A row for each subnet."""
        rows = (
            {"subnet": str(s), "median": x.median, "p95": x.p95, "": "" if x.how == "measured" else x.how}
            for s, x in self.latencies.items()
        )
        return Table(rows, {"median": ".3f", "p95": ".3f"})

    def __repr__(self) -> str:
        return "\n".join([f"{self.setting}; ms per call", repr(self.rows()), *self.notes()])

    def _repr_html_(self) -> str:
        said = "".join(
            f"<p>{html.escape(line)}</p>" for line in (f"{self.setting}; ms per call", *self.notes())
        )
        return said + self.rows()._repr_html_()

    def notes(self) -> list[str]:
        """What to know before these latencies are believed, a line each."""
        notes = []
        if self.disturbed > BUSY:
            counted = sum(latency.how == "disturbed" for latency in self.latencies.values())
            how = f"count for {counted} subnets, which had too few others" if counted else "do not count"
            notes.append(f"other processes interrupted {self.disturbed:.0%} of the calls; these {how}")
        if self.error:
            of = f"{self.error['subnets']} held-out subnets, each left out of the fit"
            off = f"median {self.error['median']:.1%}, largest {self.error['largest']:.1%}"
            notes.append(f"error of interpolation on {of}: {off}")
        return notes

    def write(self, path: Path) -> LatencyTable:
        """Write JSON; the table in this file."""
        rows = [{"subnet": str(subnet), **asdict(latency)} for subnet, latency in self.latencies.items()]
        about = {"latency": asdict(self.setting), "disturbed": self.disturbed, "error": self.error}
        write_json(path, about | {"subnets": rows})
        return replace(self, file=path)

    @classmethod
    def read(cls, path: Path, space: SearchSpace) -> LatencyTable:
        """What `write` wrote, on whatever machine. Raises InputError: something else, or other subnets."""
        expected = f"{path}: expected a latency table, as poa latency writes it"
        with as_input(expected):
            content = read_json(path, expected)
            latencies = {
                space.require(Subnet.parse(row["subnet"])): Latency(
                    float(row["median"]), float(row["p95"]), float(row["fastest"]), row["how"]
                )
                for row in content["subnets"]
            }
            if not all(math.isfinite(x.median + x.p95 + x.fastest) for x in latencies.values()):
                raise ValueError("a latency is NaN or inf")
            table = cls(
                Setting(**content["latency"]), latencies, content["disturbed"], content["error"], path
            )
            repr(table)  # which wrong types keep from being shown
            return table


def measure(
    method: MethodConfig, subnets: Sequence[Subnet], setting: Setting, device: torch.device, seconds: float
) -> LatencyTable:
    """Measure the latency of subnets as networks of their own, so many seconds each.

    Weights are random: latency does not depend on them. All are in memory at the same time. Raises
    InputError: no room for all of them, or a runtime that does not take them.
    """
    _require_room(sum(method.backbone.parameters(s) for s in subnets) * 4, len(subnets), device)
    draw = torch.Generator().manual_seed(0)
    backbone, size = method.backbone.build(draw), setting.image_size
    images = torch.randn(setting.batch, backbone.config.channels, size, size, generator=draw).to(device)
    with torch.no_grad():
        calls = {}
        for subnet in subnets:
            model = static_model(backbone, subnet, method.crops, image_size=setting.image_size)
            calls[subnet] = RUNTIMES[setting.runtime](model.to(device), images)
            calls[subnet]()
        times = interleaved(calls, device, seconds)
    disturbed = sum(len(timing.disturbed) for timing in times.values())
    share = disturbed / (disturbed + sum(len(timing.quiet) for timing in times.values()))
    latencies = {
        s: _latency(
            np.percentile(timing.counted, (50, 95, 0)), "measured" if timing.are_quiet else "disturbed"
        )
        for s, timing in times.items()
    }
    return LatencyTable(setting, latencies, share)


def _latency(values: np.ndarray, how: How) -> Latency:
    """Of the three of an array; interpolated ones are put into order."""
    fastest, median, p95 = (round(float(value), 5) for value in np.sort(values))
    return Latency(median, p95, fastest, how)


def _require_room(needed: int, count: int, device: torch.device) -> None:
    """Raise InputError where the weights do not fit into free memory, as far as that is known."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif match := re.search(r"MemAvailable: +(\d+) kB", _text_of("/proc/meminfo")):
        free = int(match[1]) * 1024
    else:
        return
    if needed > free:
        raise InputError(
            f"latency: expected {needed / 1e9:.1f} GB free for the weights of {count} subnets, got "
            f"{free / 1e9:.1f} GB; --sample measures fewer and interpolates"
        )


def interpolated(table: LatencyTable, space: SearchSpace) -> LatencyTable:
    """The table of all subnets of a space, from one of some of them. Raises InputError: those measured do not
    determine the others when one of them is held out."""
    measured = table.latencies
    rows = {subnet: _terms(subnet, space) for subnet in space}
    values = {s: np.array([latency.median, latency.p95, latency.fastest]) for s, latency in measured.items()}
    weights = _fit(rows, values)
    held_out = []
    for subnet, value in values.items():
        others = {s: v for s, v in values.items() if s != subnet}
        fitted = _fit(rows, others)
        if fitted is not None:
            wrong = abs(float((rows[subnet] @ fitted)[0] / value[0]) - 1)
            held_out.append((_leverage(rows, subnet, values), wrong))
    if weights is None or not held_out:
        raise InputError(
            f"--sample: expected at least {fewest_sampled(space)} subnets that determine the others, got "
            f"{', '.join(map(str, measured))}"
        )
    latencies = {
        s: measured[s] if s in measured else _latency(rows[s] @ weights, "interpolated") for s in space
    }
    outermost = max(1.0, min(held_out)[0])
    off = [wrong for leverage, wrong in held_out if leverage <= outermost]
    error = {"subnets": len(off), "median": float(np.median(off)), "largest": max(off)}
    return replace(table, latencies=latencies, error=error)


def _terms(subnet: Subnet, space: SearchSpace) -> np.ndarray:
    """Products of powers of the width and the blocks of the stages that vary, each in 0..1."""
    stages = list(zip(*(Subnet(1, depth).blocks for depth in space.depths), strict=True))
    varied = [b / max(s) for b, s in zip(subnet.blocks, stages, strict=True) if len(set(s)) > 1]
    powers = (subnet.width / space.widths[-1]) ** np.arange(min(DEGREE, len(space.widths) - 1) + 1.0)
    return np.outer(powers, [1.0, *varied]).ravel()


def _fit(rows: Mapping[Subnet, np.ndarray], values: Mapping[Subnet, np.ndarray]) -> np.ndarray | None:
    """The weights of `_terms` that minimise the relative errors of medians and percentiles, `[terms, 3]`;
    None where the subnets do not determine them."""
    terms, targets = np.stack([rows[s] for s in values]), np.stack(list(values.values()))
    fits = [np.linalg.lstsq(terms / f[:, None], np.ones(len(f)), rcond=None) for f in targets.T]
    if any(rank < terms.shape[1] for _, _, rank, _ in fits):
        return None
    return np.stack([weights for weights, *_ in fits], axis=1)


def _leverage(
    rows: Mapping[Subnet, np.ndarray], subnet: Subnet, values: Mapping[Subnet, np.ndarray]
) -> float:
    """That of a subnet in a fit to all others; above 1 it lies outside of them."""
    terms = {s: rows[s] / value[0] for s, value in values.items()}
    others = np.stack([row for s, row in terms.items() if s != subnet])
    weights = np.linalg.lstsq(others.T, terms[subnet], rcond=None)[0]
    return float(weights @ weights)


def fewest_sampled(space: SearchSpace) -> int:
    """Subnets that a fit needs when one of them is held out, and one to spare."""
    return len(_terms(space.intact, space)) + 2


def require_sample(space: SearchSpace, count: int) -> None:
    """Raise InputError where so many subnets, or all there are, cannot be a sample."""
    fewest = fewest_sampled(space)
    if len(space) < fewest:
        raise InputError(
            f"--sample: expected a search space of at least {fewest} subnets, got {len(space)}; measure all"
        )
    if not fewest <= count <= len(space):
        raise InputError(f"--sample: expected {fewest} to {len(space)} subnets, got {count}")


def sampled(space: SearchSpace, count: int) -> list[Subnet]:
    """So many subnets: those that determine a fit best, then a low-discrepancy sequence (R2) of the space."""
    subnets, (widths, depths) = list(space), (space.widths, space.depths)
    rows = np.stack([_terms(subnet, space) for subnet in subnets])
    chosen: dict[Subnet, None] = {}
    for _ in range(rows.shape[1]):  # the largest that is orthogonal to those before
        pick = int(np.linalg.norm(rows, axis=1).argmax())
        axis = rows[pick] / np.linalg.norm(rows[pick])
        rows = rows - np.outer(rows @ axis, axis)
        chosen[subnets[pick]] = None
    for number in itertools.count():
        if len(chosen) >= min(count, len(space)):
            break
        at = [
            int(number * step % 1 * size) for step, size in zip(R2, (len(widths), len(depths)), strict=True)
        ]
        chosen[Subnet(widths[at[0]], depths[at[1]])] = None
    return sorted(chosen)


def _cpu_name() -> str:
    named = re.search(r"model name\s*: (.+)", _text_of("/proc/cpuinfo"))
    return named[1].strip() if named else platform.processor() or platform.machine()


def _text_of(path: str) -> str:
    """Of a file of Linux; empty on other systems."""
    return Path(path).read_text() if os.path.exists(path) else ""
