"""The training step side by side: ours, plain operators, naive slicing eager and compiled, the official code.

All start from the same weights and see the same synthetic images and masks. Their losses are compared first,
without stochastic depth; a provider whose loss differs is refused. Then steps are timed, for chosen subnets
and for a mix as the method draws it, the same for all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import roofline, timing
from benchmarks.failures import Event, Failures, Refused, Trying, Unavailable, free_memory
from benchmarks.harness import ceilings_of
from benchmarks.peers import naive
from benchmarks.peers.official import OfficialStep, require_checkout
from benchmarks.results import Row, place
from elastic_kernels import backend
from poa.block_graphs import require_graphs
from poa.config import Config
from poa.errors import InputError
from poa.micro_batch import MicroBatch, crop_masks, student_passes
from poa.network import VIEWS, Batch, StudentPass
from poa.optim import Schedules
from poa.options import override
from poa.presets import QUICKSTARTS, preset
from poa.random import python_stream, torch_stream
from poa.step import Initial, TrainingState, autocast, initial_networks, train_step
from poa.subnets import SearchSpace, Subnet
from poa.tribranch import teacher_targets, tribranch_loss

# Without a GPU, to test the suite, a preset for digits with smaller heads stands in for a large one.
SMALL_HEAD = ["method.head.prototypes=8,12", "method.head.hidden=16", "method.head.bottleneck=8"]
MIX_STEPS = 12  # of the mix of subnets
WARM_UPS = {"graphs": 3}  # steps of each subnet before it is timed, if not one: as it is, captured, replayed
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative, between providers
STEP = 1000  # whose schedules hold: warmed up, with iBOT


@dataclass(frozen=True)
class Setting:
    """What every provider gets: the run's configuration, whose seed gives the weights, a micro-batch, and the
    subnets of the mixed steps."""

    config: Config
    batch: Batch
    mix: tuple[Subnet, ...]

    @property
    def images(self) -> int:
        return len(self.batch.global_crops) // VIEWS

    @property
    def space(self) -> SearchSpace:
        return self.config.method.backbone.space

    @property
    def device(self) -> torch.device:
        return self.batch.global_crops.device


def config_of(name: str, device: torch.device) -> Config:
    """The preset; without a GPU a tiny network of its kind instead."""
    config = preset(name)
    if device.type == "cuda":
        return config
    return override(preset(QUICKSTARTS[config.method.backbone.kind]), SMALL_HEAD)


@functools.lru_cache(maxsize=1)
def make_setting(config: Config, images: int, device: torch.device) -> Setting:
    """Synthetic images, four at most without a GPU, and masks and subnets as the method draws them."""
    method, images = config.method, images if device.type == "cuda" else min(images, 4)
    generator = torch.Generator(device).manual_seed(0)

    def crops(count: int, size: int) -> torch.Tensor:
        return torch.randn(count * images, 3, size, size, device=device, generator=generator)

    masks = crop_masks(method, images, python_stream(method.seed, "masks", 0, 0))
    batch = Batch(
        crops(VIEWS, method.crops.global_size),
        crops(method.crops.local_count, method.crops.local_size),
        masks.to(device),
    )
    draws = method.backbone.space.round_of_draws()
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(0)).tolist()
    return Setting(config, batch, tuple(draws[i] for i in order[:MIX_STEPS]))


@functools.lru_cache(maxsize=1)
def _initial(config: Config) -> Initial:
    return initial_networks(config)  # on the CPU, which takes it seconds


def initial_state(setting: Setting) -> TrainingState:
    """The same for every provider."""
    return TrainingState.start(setting.config, setting.device, copy.deepcopy(_initial(setting.config)))


class Ours:
    """The trainer's own step."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.state = initial_state(setting)
        self.schedules = Schedules.build(setting.config.method.optim, 1250, setting.images)
        self.temperature = self.schedules.teacher_temperature[STEP]
        self.passes = {subnet: self.drawn_passes(subnet) for subnet in {*setting.mix, *chosen(setting.space)}}

    def drawn_passes(self, elastic: Subnet) -> list[StudentPass]:
        """Both students, with stochastic depth as a step draws it."""
        draws = [torch_stream(0, "benchmark") for _ in range(2)]
        subnets = (self.setting.space.intact, elastic)
        return student_passes(self.state.student, self.setting.batch, subnets, draws)

    def loss(self, elastic: Subnet) -> float:
        """Of one micro-batch, without stochastic depth."""
        setting, method = self.setting, self.setting.config.method
        with autocast(setting.device, method.precision), torch.no_grad():
            teacher, centers = self.state.teacher, self.state.centers
            (targets,) = teacher_targets(teacher, [setting.batch], self.temperature, method.loss, centers)
            passes = [StudentPass(setting.space.intact), StudentPass(elastic)]
            intact, small = self.state.student(setting.batch, passes)
        return float(tribranch_loss(intact, small, targets, setting.batch, method.loss)[0])

    def step(self, elastic: Subnet) -> None:
        state, passes = self.state, self.passes[elastic]
        micro_batch = MicroBatch(self.setting.batch, passes)
        train_step(state.student, state, self.setting.config, self.schedules, STEP, [micro_batch])


class Official:
    """The official step, with weights of ours."""

    def __init__(self, setting: Setting, checkout: Path):
        self.setting, method = setting, setting.config.method
        self.official = OfficialStep(checkout, method, setting.device)
        self.official.load_from(initial_state(setting).student)
        self.official.start_optimizer(method.optim)
        schedules = Schedules.build(method.optim, 1250, setting.images)
        self.temperature, self.momentum = schedules.teacher_temperature[STEP], schedules.momentum[STEP]

    def loss(self, elastic: Subnet) -> float:
        with self.official.without_stochastic_depth():
            return self.official.total(self.official.losses(self.setting.batch, elastic, self.temperature))

    def step(self, elastic: Subnet) -> None:
        clip = self.setting.config.method.optim.clip
        self.official.step(self.setting.batch, elastic, self.temperature, self.momentum, clip)


Provider = Ours | Official


@contextlib.contextmanager
def open_provider(
    name: str, setting: Setting, official: Path | None
) -> Iterator[tuple[Provider, Callable[[], int]]]:
    """A provider, and how many graphs it compiled so far; what it holds is freed in the end."""

    def none() -> int:
        return 0

    with contextlib.ExitStack() as stack:
        if name == "official":
            if official is None:
                raise Unavailable("no checkout was named with --official")
            provider = Official(setting, official)
            stack.callback(provider.official.close)
            print("    official code, patched:", *provider.official.patches, sep="\n        ")
            yield provider, none
        elif name in ("naive", "compiled"):
            yield Ours(setting), stack.enter_context(naive.installed(compiled=name == "compiled"))
        else:
            if name == "reference":
                stack.enter_context(backend("reference"))
            ours = Ours(with_graphs(setting) if name == "graphs" else setting)
            stack.enter_context(ours.state.undisturbed())
            yield ours, none
    free_memory()


def with_graphs(setting: Setting) -> Setting:
    """The same with blocks as CUDA graphs. Raises Unavailable: there are none of this network, or here."""
    try:
        require_graphs(setting.device)
        return replace(setting, config=override(setting.config, ["performance.cuda_graphs=true"]))
    except InputError as error:
        raise Unavailable(str(error)) from None


PROVIDERS = ("ours", "graphs", "reference", "naive", "compiled", "official")


def chosen(space: SearchSpace) -> list[Subnet]:
    """The smallest subnet, one in the middle, and the intact network."""
    return list(dict.fromkeys((space.smallest, middle(space), space.intact)))


def middle(space: SearchSpace) -> Subnet:
    return Subnet(space.widths[len(space.widths) // 2], space.depths[len(space.depths) // 2])


def run(
    name: str,
    images: int,
    device: torch.device,
    official: Path | None,
    seconds: float,
    only: Collection[str] = PROVIDERS,
    without: Collection[str] = (),
    all_widths: bool = False,
) -> Iterator[Event]:
    """Measure steps of a preset; yields rows as they come, and the providers that fail.

    Args:
        name: of the preset; without a GPU a tiny network is used instead.
        images: of the measured micro-batch.
        device: to run on.
        official: checkout of the official code, or None.
        seconds: of measuring each provider and subnet.
        only, without: names of providers.
        all_widths: compile naive slicing for the mix, not for two widths alone.

    Raises:
        ValueError: `official` is no such checkout.
        DeviceLost: a provider left the device unusable.
    """
    if official is not None:
        require_checkout(official)
    config = config_of(name, device)
    ceilings, failures = ceilings_of(device, min(seconds, timing.MEASURE)), Failures()
    setting = make_setting(config, images, device)
    for which in PROVIDERS:
        if which not in only or which in without:
            continue
        yield Trying(which)
        with failures.of(which):
            expected = expected_loss(config, images, device)
            with open_provider(which, setting, official) as (provider, compiled):
                loss = provider.loss(setting.space.smallest)
                tolerance = LOSS_TOLERANCE[config.method.precision]
                if not abs(loss - expected) <= tolerance * abs(expected):
                    raise Unavailable(f"its loss is {loss:.5f}, expected {expected:.5f}")
                few = which == "compiled" and not all_widths
                yield from measure(which, provider, modes(setting, few), compiled, ceilings, seconds)
        if which in failures:
            yield Refused(which, failures[which])


@functools.lru_cache(maxsize=1)
def expected_loss(config: Config, images: int, device: torch.device) -> float:
    """Of our step with the smallest subnet."""
    setting = make_setting(config, images, device)
    loss = Ours(setting).loss(setting.space.smallest)
    free_memory()
    return loss


def modes(setting: Setting, few: bool) -> dict[str, tuple[Subnet, ...]]:
    """Subnets that are measured together: each chosen one, and the mix; of two widths where they are few."""
    if few:
        return {
            str(subnet): (subnet,) for subnet in dict.fromkeys((middle(setting.space), setting.space.intact))
        }
    return {**{str(subnet): (subnet,) for subnet in chosen(setting.space)}, "mix": setting.mix}


def measure(
    which: str,
    provider: Provider,
    modes: dict[str, tuple[Subnet, ...]],
    compiled: Callable[[], int],
    ceilings: roofline.Ceilings,
    seconds: float,
) -> Iterator[Row]:
    """Rows of a provider, with its launches: what a run would take."""
    setting = provider.setting
    timer = timing.timer_of(setting.device, hide=False)
    for mode, subnets in modes.items():
        started, graphs = time.perf_counter(), compiled()
        for _ in range(WARM_UPS.get(which, 1)):  # compiles, allocates
            _steps(provider, dict.fromkeys(subnets))
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        warm_up, graphs = time.perf_counter() - started, compiled() - graphs
        call = timing.timed(partial(_steps, provider, subnets))
        times, end = [timer(call)[0]], time.perf_counter() + seconds
        while time.perf_counter() < end:
            times.append(timer(call)[0])
        row = row_of(which, mode, setting, subnets, [t / len(subnets) for t in times], ceilings)
        yield row | {"graphs": graphs, "warm_up_s": warm_up}


def _steps(provider: Provider, subnets: Iterable[Subnet]) -> None:
    for subnet in subnets:
        provider.step(subnet)


def row_of(
    which: str,
    mode: str,
    setting: Setting,
    subnets: Sequence[Subnet],
    times: Sequence[float],
    ceilings: roofline.Ceilings,
) -> Row:
    method, cuda = setting.config.method, setting.device.type == "cuda"
    work = roofline.Workload(method, setting.images, len(setting.batch.masks.indices))
    totals = [roofline.Summary.of(roofline.step(work, subnet), ceilings) for subnet in subnets]
    whole = replace(work, skip_dead_tokens=False)  # as specified: with the unused tokens of the last block
    specified = [roofline.Summary.of(roofline.step(whole, subnet), ceilings).flops for subnet in subnets]
    spread = timing.quantiles(times)
    seconds = spread["p50"] / 1e6
    return {
        "op": "step",
        "provider": which,
        "mode": mode,
        "shape": f"{method.backbone.space.intact} {setting.images} images",
        "dtype": method.precision,
        "batch": setting.images,
        **spread,
        "images_per_s": setting.images / seconds,
        "mfu": sum(specified) / len(specified) / seconds / ceilings.peak if ceilings.peak else None,
        "share_of_floor": sum(t.floor for t in totals) / len(totals) / seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        **place(setting.device.type),
    }
