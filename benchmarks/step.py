"""The training step side by side: ours, plain operators, naive slicing eager and compiled, the official code.

All start from the same weights and see the same synthetic images and masks. Their losses are compared first,
without stochastic depth; a provider whose loss differs is refused. Then steps are timed, for chosen subnets
and for a mix as the method draws it, the same for all.
"""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness, roofline
from benchmarks.harness import Unavailable
from benchmarks.peers import naive
from benchmarks.peers.official import OfficialStep, require_checkout
from benchmarks.results import Row, place
from elastic_kernels import backend
from poa.config import Config
from poa.data.augment import augment
from poa.device import join
from poa.micro_batch import MicroBatch, crop_masks, student_passes
from poa.network import VIEWS, Batch, StudentOutput, StudentPass
from poa.optim import Schedules, update_weights
from poa.options import override
from poa.presets import preset
from poa.random import python_stream, torch_stream
from poa.step import TrainingState, autocast, train_step
from poa.subnets import SearchSpace, Subnet
from poa.tribranch import Targets, teacher_targets, tribranch_loss

TINY_HEAD = ["method.head.prototypes=8,12", "method.head.hidden=16", "method.head.bottleneck=8"]
TINY = {  # what runs without a GPU, to test the suite: a preset, and what is smaller still
    "vit": (
        "quickstart",
        [
            "method.backbone.min_width=16",
            "method.backbone.max_width=32",
            "method.backbone.min_depth=1",
            "method.backbone.max_depth=2",
            *TINY_HEAD,
        ],
    ),
    "swin": ("quickstart-swin", TINY_HEAD),
    "resnet": ("quickstart-resnet", TINY_HEAD),
}
MIX_STEPS = 12  # of the mix of subnets
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative, between providers
STEP = 1000  # whose schedules hold: warmed up, with iBOT


@dataclass(frozen=True)
class Setting:
    """What every provider gets.

    Attributes:
        config: of the run; its seed gives the weights.
        batch: the chunk.
        mix: subnets of the mixed steps.
    """

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
    """The preset; without a GPU a tiny network of its kind stands for it."""
    config = preset(name)
    if device.type == "cuda":
        return config
    stand_in, smaller = TINY[config.method.backbone.kind]
    return override(preset(stand_in), smaller)


def setting(config: Config, images: int, device: torch.device) -> Setting:
    """Synthetic images, and masks and subnets as the method draws them."""
    method = config.method
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


class Ours:
    """The trainer's own step."""

    def __init__(self, here: Setting):
        self.here = here
        self.state = TrainingState.start(here.config, here.device)
        self.schedules = Schedules.build(here.config.method.optim, 1250, here.images)
        self.temperature = self.schedules.teacher_temperature[STEP]
        self.passes = {subnet: self.drawn_passes(subnet) for subnet in {*here.mix, *chosen(here.space)}}

    def drawn_passes(self, elastic: Subnet) -> list[StudentPass]:
        """Both students, with stochastic depth as a step draws it."""
        subnets, draws = (self.here.space.intact, elastic), [torch_stream(0, "benchmark") for _ in range(2)]
        return student_passes(self.state.student, self.here.batch, subnets, draws)

    def loss(self, elastic: Subnet) -> float:
        """Of one chunk, without stochastic depth."""
        here, method = self.here, self.here.config.method
        with autocast(here.device, method.precision), torch.no_grad():
            centers = self.state.centers
            (targets,) = teacher_targets(
                self.state.teacher, [here.batch], self.temperature, method.loss, centers
            )
            outputs = self.state.student(
                here.batch, [StudentPass(self.here.space.intact), StudentPass(elastic)]
            )
        intact, small = outputs
        return float(tribranch_loss(intact, small, targets, here.batch, method.loss)[0])

    def step(self, elastic: Subnet) -> None:
        """A whole step."""
        state, passes = self.state, self.passes[elastic]
        chunk = MicroBatch(self.here.batch, passes)
        train_step(state.student, state, self.here.config, self.schedules, STEP, [chunk])


class Official:
    """The official step, with weights of ours."""

    def __init__(self, here: Setting, checkout: Path):
        self.here, method = here, here.config.method
        self.official = OfficialStep(checkout, method, here.device)
        self.official.load_from(TrainingState.start(here.config, here.device).student)
        self.official.start_optimizer(method.optim)
        schedules = Schedules.build(method.optim, 1250, here.images)
        self.temperature, self.momentum = schedules.teacher_temperature[STEP], schedules.momentum[STEP]

    def loss(self, elastic: Subnet) -> float:
        with self.official.without_stochastic_depth():
            return self.official.total(self.official.losses(self.here.batch, elastic, self.temperature))

    def step(self, elastic: Subnet) -> None:
        clip = self.here.config.method.optim.clip
        self.official.step(self.here.batch, elastic, self.temperature, self.momentum, clip)


Provider = Ours | Official


@contextlib.contextmanager
def provider(name: str, here: Setting, official: Path | None) -> Iterator[tuple[Provider, Callable[[], int]]]:
    """A provider, and how many graphs it compiled so far; what it holds is freed in the end."""

    def none() -> int:
        return 0

    with contextlib.ExitStack() as stack:
        if name == "official":
            if official is None:
                raise Unavailable("no checkout was named with --official")
            found = Official(here, official)
            stack.callback(found.official.close)
            print("    official code, patched:", *found.official.patches, sep="\n        ")
            yield found, none
        elif name in ("naive", "compiled"):
            yield Ours(here), stack.enter_context(naive.installed(compiled=name == "compiled"))
        else:
            if name == "reference":
                stack.enter_context(backend("reference"))
            yield Ours(here), none
    gc.collect()
    if here.device.type == "cuda":
        torch.cuda.empty_cache()


PROVIDERS = ("ours", "reference", "naive", "compiled", "official")


def chosen(space: SearchSpace) -> list[Subnet]:
    """The smallest subnet, one in the middle, and the intact network."""
    return list(dict.fromkeys((space.smallest, middle(space), space.intact)))


def middle(space: SearchSpace) -> Subnet:
    """One in the middle."""
    return Subnet(space.widths[len(space.widths) // 2], space.depths[len(space.depths) // 2])


def run(
    name: str, images: Sequence[int], device: torch.device, official: Path | None, seconds: float
) -> list[Row]:
    """Measure steps of a preset with so many images.

    Args:
        name: of the preset; without a GPU a tiny network stands for it.
        images: of each measured chunk.
        device: to run on.
        official: checkout of the official code, or None.
        seconds: of measuring each provider and subnet.

    Raises:
        ValueError: `official` is no such checkout.
    """
    if official is not None:
        require_checkout(official)
    config = config_of(name, device)
    ceilings, rows = harness.ceilings_of(device, min(seconds, harness.MEASURE)), []
    for count in (
        images if device.type == "cuda" else [min(*images, 4) if len(images) > 1 else min(images[0], 4)]
    ):
        here = setting(config, count, device)
        rows += parts(Ours(here), ceilings, seconds)
        expected = None
        for which in PROVIDERS:
            try:
                with provider(which, here, official) as (found, compiled):
                    loss = found.loss(chosen(here.space)[0])
                    expected = loss if expected is None else expected
                    tolerance = LOSS_TOLERANCE[config.method.precision]
                    if abs(loss - expected) > tolerance * abs(expected):
                        raise Unavailable(f"its loss is {loss:.5f}, expected {expected:.5f}")
                    rows += measure(which, found, here, compiled, ceilings, seconds)
            except Exception as error:  # peers fail in their own ways; ours may only run out of memory
                if which == "ours" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
                print(f"    {which:12}not measured: {kind}{str(error).partition(chr(10))[0]}")
    return rows


def measure(
    which: str,
    found: Provider,
    here: Setting,
    compiled: Callable[[], int],
    ceilings: roofline.Ceilings,
    seconds: float,
) -> list[Row]:
    """Rows of a provider: each chosen subnet, and the mix."""
    rows = []
    for mode, subnets in (*((str(s), (s,)) for s in chosen(here.space)), ("mix", here.mix)):
        started, graphs = time.perf_counter(), compiled()
        for subnet in dict.fromkeys(subnets):
            found.step(subnet)  # compiles, allocates
        _synchronize(here.device)
        warm_up, graphs = time.perf_counter() - started, compiled() - graphs
        if here.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        call, timer = harness.timed(partial(_steps, found, subnets)), harness.timer_of(here.device)
        times, end = [timer(call)], time.perf_counter() + seconds
        while time.perf_counter() < end:
            times.append(timer(call))
        times = [t / len(subnets) for t in times]
        row = _row(which, mode, here, subnets, times, ceilings)
        row |= {"graphs": graphs, "warm_up_s": warm_up}
        rows.append(row)
        print(
            f"    {which:12}{mode:10}{row['images_per_s']:9.1f} images/s  {row['p50'] / 1e3:9.2f} ms"
            + (f"  MFU {row['mfu']:.1%}" if row["mfu"] is not None else "")
            + f"  {row['share_of_floor']:.1%} of floor"
            + (f"  {row['peak_mib']:.0f} MiB" if row["peak_mib"] is not None else "")
            + (f"  {graphs} graphs compiled in {warm_up:.0f} s" if graphs else ""),
            flush=True,
        )
    return rows


def _steps(found: Provider, subnets: Sequence[Subnet]) -> None:
    for subnet in subnets:
        found.step(subnet)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _row(
    which: str,
    mode: str,
    here: Setting,
    subnets: Sequence[Subnet],
    times: Sequence[float],
    ceilings: roofline.Ceilings,
) -> Row:
    method, cuda = here.config.method, here.device.type == "cuda"
    work = roofline.Workload(method, here.images, len(here.batch.masks.indices))
    totals = [roofline.Summary.of(roofline.step(work, subnet), ceilings) for subnet in subnets]
    specified = [
        roofline.Summary.of(roofline.step(_whole(work), subnet), ceilings).flops for subnet in subnets
    ]
    spread = harness.quantiles(times)
    seconds = spread["p50"] / 1e6
    return {
        "op": "step",
        "provider": which,
        "mode": mode,
        "shape": f"{method.backbone.space.intact} {here.images} images",
        "dtype": method.precision,
        "batch": here.images,
        **spread,
        "images_per_s": here.images / seconds,
        "mfu": sum(specified) / len(specified) / seconds / ceilings.peak if ceilings.peak else None,
        "share_of_floor": sum(t.floor for t in totals) / len(totals) / seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        **place(here.device.type),
    }


def _whole(work: roofline.Workload) -> roofline.Workload:
    """As specified: with the tokens of the last block that nobody reads."""
    return roofline.Workload(work.method, work.images, work.masked, skip_dead_tokens=False)


def parts(ours: Ours, ceilings: roofline.Ceilings, seconds: float) -> list[Row]:
    """Time by part of our step, for the middle subnet."""
    here = ours.here
    subnet = middle(here.space)
    rows = []
    for name, times in harness.interleaved(_parts(ours, subnet), here.device, seconds).items():
        rows.append(_row("ours", f"{subnet} {name}", here, (subnet,), times, ceilings))
        rows[-1]["op"] = "step part"
        print(f"    {name:16}{rows[-1]['p50'] / 1e3:9.2f} ms", flush=True)
    return rows


def _parts(ours: Ours, subnet: Subnet) -> dict[str, harness.Timed]:
    """Augmentation, teacher with targets, each student's forward, losses, backward, update."""
    here, state, method = ours.here, ours.state, ours.here.config.method
    intact, elastic = ours.passes[subnet]
    shape = (here.images, 3, method.canvas, method.canvas)
    canvases = torch.randint(256, shape, dtype=torch.uint8, device=here.device)
    sizes = torch.full((here.images, 2), method.canvas)

    def data() -> object:
        return augment(canvases, sizes, method.crops, torch_stream(0, "benchmark"))

    def teacher() -> Targets:
        with autocast(here.device, method.precision):
            (targets,) = teacher_targets(
                state.teacher, [here.batch], ours.temperature, method.loss, state.centers
            )
        join(targets.stream)  # timed to their end
        return targets

    def student(passes: list[StudentPass]) -> list[StudentOutput]:
        with autocast(here.device, method.precision):
            return state.student(here.batch, passes)

    def losses() -> Callable[[], Tensor]:
        targets, (large, small) = teacher(), student([intact, elastic])
        return lambda: tribranch_loss(large, small, targets, here.batch, method.loss)[0]

    def backward() -> Callable[[], object]:
        loss = losses()()
        state.optimizer.zero_grad(set_to_none=True)
        return lambda: loss.backward()

    def update() -> Callable[[], object]:
        backward()()

        def all_of_it() -> None:
            clip, momentum = method.optim.clip, ours.schedules.momentum[STEP]
            update_weights(state.optimizer, state.student, state.teacher, clip, momentum)

        return all_of_it

    return {
        "data": harness.timed(data),
        "teacher": harness.timed(teacher),
        "intact forward": harness.timed(partial(student, [intact])),
        "elastic forward": harness.timed(partial(student, [elastic])),
        "losses": losses,
        "backward": backward,
        "update": update,
    }


# Kernels by name, and the costs that are their floor.
FAMILIES = (
    (
        "norms",
        r"^_(layer|group)_norm|^_branch_grad",
        r"norm [123]$|(last|embedding|merging|stem|shortcut) norm",
    ),
    ("attention", r"^_(window_)?attention|flash|fmha", r"attention"),
    (
        "products",
        r"gemm|cutlass|nvjet|conv|^_linear",
        r"qkv|proj|fc|conv|patch embedding|merging(?! norm)|head MLP",
    ),
    ("pooling", r"pool", r"pooling"),
    ("losses", r"^_losses|^_(row|column)_(pass|merge)", r"prototypes|losses|Sinkhorn"),
    ("optimiser", r"adam|multi_tensor|lerp|foreach", r"AdamW|gradient norm"),
)


def profile(name: str, images: int, device: torch.device) -> str:
    """The twenty largest kernels of one of our steps, launches, and families against their floor."""
    config = config_of(name, device)
    here = setting(config, images if device.type == "cuda" else 4, device)
    ours, subnet = Ours(here), middle(here.space)
    for _ in range(3):
        ours.step(subnet)
    _synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        ours.step(subnet)
        _synchronize(device)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    kernels = {e.key: (getattr(e, field), e.count) for e in profiler.key_averages() if getattr(e, field) > 0}
    if device.type == "cuda":  # the device's own events, not the operators that launched them
        kernels = {e.key: (getattr(e, field), e.count) for e in profiler.key_averages() if _on_device(e)}
    total = sum(t for t, _ in kernels.values())
    launches = sum(count for _, count in kernels.values())
    lines = [f"{subnet}, {here.images} images: {total / 1e3:.2f} ms in {launches} launches"]
    work = roofline.Workload(config.method, here.images, len(here.batch.masks.indices))
    shares = _family_shares(kernels, roofline.step(work, subnet), harness.ceilings_of(device))
    for key, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:20]:
        family = next((name for name, pattern, _ in FAMILIES if re.search(pattern, key, re.IGNORECASE)), "")
        floor = f"{family} {shares[family]:.1%} of floor" if family else "not in the cost model"
        lines.append(f"{spent / 1e3:9.3f} ms {spent / total:6.1%} {count:6} x  {floor:28} {key[:60]}")
    return "\n".join(lines)


def _family_shares(
    kernels: dict[str, tuple[float, int]], costs: Sequence[roofline.Cost], ceilings: roofline.Ceilings
) -> dict[str, float]:
    """Floor over time of each family that ran; the cost model knows families, not a library's kernels."""
    shares = {}
    for family, pattern, of_costs in FAMILIES:
        spent = sum(t for key, (t, _) in kernels.items() if re.search(pattern, key, re.IGNORECASE))
        if spent:
            floor = sum(c.floor(ceilings) for c in costs if re.search(of_costs, c.kernel))
            shares[family] = floor * 1e6 / spent
    return shares


def _on_device(event: object) -> bool:
    return str(getattr(event, "device_type", "")).endswith("CUDA")
