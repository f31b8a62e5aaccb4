"""Where the time of our step goes: its parts, its largest kernels, and families of them against the floor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness, roofline, timing
from benchmarks.results import Row, place
from benchmarks.step import STEP, Ours, config_of, make_setting, middle, row_of
from poa.data.augment import augment
from poa.device import wait_stream
from poa.network import StudentOutput, StudentPass
from poa.optim import update_weights
from poa.random import torch_stream
from poa.step import autocast
from poa.subnets import Subnet
from poa.tribranch import Targets, teacher_targets, tribranch_loss


def parts(name: str, images: int, device: torch.device, seconds: float) -> Iterator[Row]:
    """Time by part of our step, for the middle subnet; launches are hidden as far as a queue holds them."""
    setting = make_setting(config_of(name, device), images, device)
    ours, subnet, ceilings = Ours(setting), middle(setting.space), harness.ceilings_of(device)
    for part, samples in timing.interleaved(_parts(ours, subnet), device, seconds).items():
        row = row_of("ours", f"{subnet} {part}", setting, (subnet,), samples.seconds, ceilings)
        yield row | {"op": "step part", "unhidden": samples.unhidden / len(samples.seconds)}


def _parts(ours: Ours, subnet: Subnet) -> dict[str, timing.Timed]:
    """Augmentation, teacher with targets, each student's forward, losses, backward, update."""
    setting, state, method = ours.setting, ours.state, ours.setting.config.method
    intact, elastic = ours.passes[subnet]
    shape = (setting.images, 3, method.canvas, method.canvas)
    canvases = torch.randint(256, shape, dtype=torch.uint8, device=setting.device)
    sizes = torch.full((setting.images, 2), method.canvas)

    def data() -> object:
        return augment(canvases, sizes, method.crops, torch_stream(0, "benchmark"))

    def teacher() -> Targets:
        with autocast(setting.device, method.precision):
            (targets,) = teacher_targets(
                state.teacher, [setting.batch], ours.temperature, method.loss, state.centers
            )
        wait_stream(targets.stream)  # timed to their end
        return targets

    def student(passes: list[StudentPass]) -> list[StudentOutput]:
        with autocast(setting.device, method.precision):
            return state.student(setting.batch, passes)

    def losses() -> Callable[[], Tensor]:
        targets, (large, small) = teacher(), student([intact, elastic])
        return lambda: tribranch_loss(large, small, targets, setting.batch, method.loss)[0]

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
        "data": timing.timed(data),
        "teacher": timing.timed(teacher),
        "intact forward": timing.timed(partial(student, [intact])),
        "elastic forward": timing.timed(partial(student, [elastic])),
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


def profile(name: str, images: int, device: torch.device) -> Row:
    """A row whose `lines` are the twenty largest kernels of one of our steps, with its launches."""
    config = config_of(name, device)
    setting = make_setting(config, images, device)
    ours, subnet = Ours(setting), middle(setting.space)
    for _ in range(3):
        ours.step(subnet)
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        torch.cuda.synchronize()
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        ours.step(subnet)
        if cuda:
            torch.cuda.synchronize()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if getattr(e, field) > 0]
    if cuda:  # the device's own events, not the operators that launched them
        events = [e for e in profiler.key_averages() if str(e.device_type).endswith("CUDA")]
    kernels = {e.key: (getattr(e, field), e.count) for e in events}
    total = sum(t for t, _ in kernels.values())
    launches = sum(count for _, count in kernels.values())
    lines = [f"{subnet}, {setting.images} images: {total / 1e3:.2f} ms in {launches} launches"]
    work = roofline.Workload(config.method, setting.images, len(setting.batch.masks.indices))
    shares = _family_shares(kernels, roofline.step(work, subnet), harness.ceilings_of(device))
    for key, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:20]:
        family = next((name for name, pattern, _ in FAMILIES if re.search(pattern, key, re.IGNORECASE)), "")
        floor = f"{family} {shares[family]:.1%} of floor" if family else "not in the cost model"
        lines.append(f"{spent / 1e3:9.3f} ms {spent / total:6.1%} {count:6} x  {floor:28} {key[:60]}")
    row: Row = {
        "op": "profile",
        "provider": "ours",
        "mode": str(subnet),
        "shape": f"{setting.space.intact} {setting.images} images",
    }
    return row | {"dtype": config.method.precision, "launches": launches, "lines": lines} | place(device.type)


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
