"""Everything a GPU is needed for, in parts by their worth: `python -m benchmarks gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, networks, profiling, report, step
from benchmarks.cases import CASES, Sizes, sizes_of
from benchmarks.failures import DeviceLost, Refused, Settled, Trying, Unavailable, is_device_lost
from benchmarks.journal import Journal
from benchmarks.results import Row, clocks, place, versions
from benchmarks.runner import Case, Emit, Part, Runner

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = {
    "attention": ("attention", "window_attention"),
    "products": ("linear", "linear_gelu", "qkv", "linear_residual", "mlp"),
    "norms": ("layer_norm", "group_norm", "rms_norm", "qk_norm"),
    "designs": (
        *("swiglu", "nested_mlp", "mixed_linear", "mixed_norm", "mixed_mlp", "mixed_attention"),
        *("mixed_block", "offsets", "patch_embed", "conv1x1"),
    ),
    "losses": ("prototype_losses", "sinkhorn"),
    "optimizer": ("optimizer",),
    "blocks": ("block", "swin_block", "bottleneck"),
}
COMPILED_WIDTHS = 2  # of an operator, and of a network's subnets: each takes the compiler many seconds
COMPILED = frozenset({"compiled", "timm compiled"})
IMAGES, FEW_IMAGES = 64, 8  # of a step; few, where the host limits it
OFFICIAL_IMAGES, LARGE = (32, 50), 100e9  # what the official code can take on a GPU of less memory than this
PARTS = (
    *("environment", "tests", "attention", "products", "norms", "losses", "optimizer", "profile", "step"),
    *("blocks", "designs", "step-swin", "step-resnet", "networks"),
)


@dataclass(frozen=True)
class Plan:
    """What is to be run, and where.

    Attributes:
        device: cuda; or cpu, where all of it runs tiny, to rehearse.
        memory: bytes of the device.
        official: checkout of the official code, or None.
        all_widths: measure operators at all of them, and compile naive slicing for all.
    """

    device: str
    memory: float
    official: Path | None
    all_widths: bool

    def parts(self) -> list[Part]:
        """All, in order of worth."""
        processes = max(min(8, (os.cpu_count() or 1) // 2), 1)
        parts = {
            "environment": Part("environment", [Case("versions, ceilings", partial(environment, self), 60)]),
            "tests": Part("tests", list(self._tests()), processes, fresh=True, share=0.4),
            "profile": Part("profile", list(self._profiles())),
            "step": Part("step", list(self._steps("vit-l16"))),
            "step-swin": Part("step-swin", list(self._steps("swin-b"))),
            "step-resnet": Part("step-resnet", list(self._steps("resnet-152"))),
            "networks": Part("networks", list(self._networks())),
        }
        parts |= {name: Part(name, list(self._operators(cases))) for name, cases in OPERATORS.items()}
        return [parts[name] for name in PARTS]

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.where, self.all_widths)

    def _profiles(self) -> Iterator[Case]:
        yield Case("parts", partial(parts_of_step, self), 120)
        yield Case("kernels", partial(largest_kernels, self), 120)

    def _tests(self) -> Iterator[Case]:
        """Files with tests that need a GPU, whole steps first."""
        files = (p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in p.read_text())
        for path in sorted(files, key=lambda p: "kernels" in p.parts):
            name = str(path.relative_to(ROOT))
            yield Case(name, partial(run_tests, self, name), 120)

    def _operators(self, names: Sequence[str]) -> Iterator[Case]:
        for case in CASES:
            if case.name in names:
                for number, (label, rank) in enumerate(case.labels(self.sizes)):
                    many = case.of == "widths" and rank >= COMPILED_WIDTHS and not self.all_widths
                    run = partial(operator, self, case.name, number, COMPILED if many else frozenset())
                    yield Case(f"{case.name} {label}", run, 60)

    def _steps(self, name: str) -> Iterator[Case]:
        """Ours beside its peers; the official code with as many images as it can take, and ours with them;
        ours with few, and replayed as CUDA graphs."""
        wanted = [(IMAGES, which) for which in ("ours", "naive", "compiled", "reference")]
        if self.official and name == "vit-l16":
            counts = OFFICIAL_IMAGES if self.memory < LARGE else (IMAGES,)
            wanted[1:1] = [(count, which) for count in counts for which in ("official", "ours")]
        if name == "vit-l16":
            wanted += [(FEW_IMAGES, which) for which in ("ours", "graphs")]
        for images, which in dict.fromkeys(wanted):
            yield Case(f"{name} {images} images {which}", partial(steps, self, name, images, which), 180)

    def _networks(self) -> Iterator[Case]:
        for name in ("vit-l16", "swin-b", "resnet-152"):
            for rank, subnet in enumerate(("intact", "middle", "smallest")):
                many = rank >= COMPILED_WIDTHS and not self.all_widths
                run = partial(network, self, name, subnet, COMPILED if many else frozenset())
                yield Case(f"{name} {subnet}", run, 120)


def environment(plan: Plan, emit: Emit, without: frozenset[str]) -> None:
    """Ceilings, clocks, and versions of what takes part."""
    ceilings = harness.ceilings_of(plan.where)
    row: Row = {"op": "ceilings", "provider": "device", "mode": "", "shape": ceilings.source}
    row |= {"dtype": "bfloat16", "tflop_per_s": ceilings.matmul / 1e12, "gb_per_s": ceilings.copy / 1e9}
    row |= {"versions": versions(), "clocks": clocks()}
    emit(row | place(plan.where.type))


def operator(
    plan: Plan, name: str, number: int, aside: frozenset[str], emit: Emit, without: frozenset[str]
) -> None:
    case = next(case for case in CASES if case.name == name)
    make = list(case.problems(plan.where, plan.sizes))[number]
    ceilings = harness.ceilings_of(plan.where)
    for event in harness.run(make(), ceilings, seconds=0.15, without=without | aside):
        emit(event)


def parts_of_step(plan: Plan, emit: Emit, without: frozenset[str]) -> None:
    for row in profiling.parts("vit-l16", IMAGES, plan.where, 0.5):
        emit(row)


def largest_kernels(plan: Plan, emit: Emit, without: frozenset[str]) -> None:
    row = profiling.profile("vit-l16", IMAGES, plan.where)
    print("\n".join(row["lines"]), flush=True)
    emit(row)


def steps(plan: Plan, name: str, images: int, which: str, emit: Emit, without: frozenset[str]) -> None:
    official = plan.official if which == "official" else None
    for event in step.run(name, images, plan.where, official, 1.5, [which], without, plan.all_widths):
        emit(event)


def network(
    plan: Plan, name: str, subnet: str, aside: frozenset[str], emit: Emit, without: frozenset[str]
) -> None:
    for event in networks.run(name, subnet, IMAGES, plan.where, 0.5, without | aside):
        emit(event)


def run_tests(plan: Plan, file: str, emit: Emit, without: frozenset[str]) -> None:
    """The tests of a file that need a GPU, a row each.

    Raises:
        DeviceLost: a test left the device unusable.
        Unavailable: some failed, or pytest could not run them.
    """
    import pytest

    os.chdir(ROOT)
    reporter = Reporter(plan.where.type, emit)
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", *(f"--deselect={test}" for test in without)]
    status = pytest.main([file, *options], plugins=[reporter])
    if reporter.lost:
        raise DeviceLost(reporter.lost.provider, reporter.lost.reason)
    if reporter.failed:
        raise Unavailable(f"{reporter.failed} failed")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise Unavailable(f"pytest ended with status {int(status)}: {reporter.error}")


class Reporter:
    """A plugin of pytest's that makes rows of outcomes."""

    def __init__(self, device: str, emit: Emit):
        self.device, self.emit = device, emit
        self.lost: Refused | None = None
        self.failed, self.error = 0, ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.error = _reason(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.emit(Trying(nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        import pytest

        if report.when != "call" and report.passed:
            return
        row = {"op": "test", "provider": report.nodeid, "mode": report.outcome, "shape": "", "dtype": ""}
        self.emit(row | {"seconds": report.duration} | place(self.device))
        if not report.failed:
            self.emit(Settled(report.nodeid))
            return
        self.failed += 1
        refused = Refused(report.nodeid, _reason(report))
        if is_device_lost():
            self.lost = refused
            pytest.exit("the device is lost")
        self.emit(refused)


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return lines[0 if crash else -1] if lines else "no reason was given"


def measure_all(plan: Plan, journal: Journal, minutes: float, only: Sequence[str]) -> int:
    """Run parts for some minutes; the tables, failures and what is left are printed last."""
    wanted = [part for part in plan.parts() if part.name in only]
    runner = Runner(journal, 60 * minutes)
    try:
        runner.run(wanted)
    finally:
        print("\n".join(summary(runner, wanted)), flush=True)
    return 1 if journal.has_failed() else 0


def summary(runner: Runner, parts: Sequence[Part]) -> Iterator[str]:
    """What failed and why, what is left, tables by operator and step."""
    rows, left = report.newest(runner.journal.rows()), {part.name: runner.left(part) for part in parts}
    if failures := runner.journal.failures():
        yield from ("failed, or not to be had:", *(f"    {failure}" for failure in failures))
    for part in parts:
        done = len(part.cases) - len(left[part.name])
        names = ", ".join(case.name for case in left[part.name])
        rest = f"; left for --resume: {names}" if names else ""
        yield f"{part.name:12} {done:3} of {len(part.cases)} cases{rest}"
    yield f"rows, ends of cases and logs: {runner.journal.folder}"
    yield from (text for text in (report.kernel_table(rows), report.step_table(rows)) if text)
