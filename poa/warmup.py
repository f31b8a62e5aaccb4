"""Compile every kernel that a run can need before it needs it."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from elastic_kernels import absent_gpu, compilations, fused_adamw_backend
from poa.config import Config
from poa.device import choose_device
from poa.errors import InputError
from poa.memory import planned_state
from poa.micro_batch import Draws, MicroBatch, make_micro_batch
from poa.optim import Schedules
from poa.random import torch_stream
from poa.step import TrainingState, autocast, train_step
from poa.subnets import Subnet


def warm_up(config: Config) -> Iterator[str]:
    """Take steps on noise with an elastic student of every width, with masks and without; a line for each
    width.

    Kernels know widths and not depths, so the shallowest subnets stand for all. What was compiled stays in
    Triton's cache on disk, where runs of this machine find it. Raises InputError: no kernels run on
    `run.device`.
    """
    device = choose_device(config.run.device)
    state = TrainingState.start(config, device)
    choice = fused_adamw_backend(next(state.student.parameters()))
    if choice.backend != "triton":
        raise InputError(f"warmup: expected a device that runs Triton kernels, got {device}: {choice.reason}")
    space = config.method.backbone.space
    for width in space.widths:
        started = time.perf_counter()
        with compilations() as compiled:
            warm_up_steps(Subnet(width, space.smallest.depth), config, state)
            if device.type == "cuda":
                torch.cuda.synchronize()
        yield f"width {width:>5}: {compiled.count} kernels compiled, {time.perf_counter() - started:.1f} s"


def warm_up_absent(
    config: Config, architecture: str, cache: Path, triton_key: str | None = None
) -> Iterator[str]:
    """The same for an absent GPU, such as sm_90: no kernel runs, and the folder `cache` takes what was
    compiled.

    Kernels get the settings that they have without a table of timed ones. `triton_key` is of the Triton that
    shall read the folder, if not of this one. There is a line for each kernel, and how to use the folder.
    Raises InputError: an unknown architecture, or Triton cannot compile here.
    """
    try:
        gpu = absent_gpu(architecture)
    except ValueError as error:
        raise InputError(f"--arch: {error}") from None
    space = config.method.backbone.space
    with gpu as launches:
        state = planned_state(config)
        for width in space.widths:
            warm_up_steps(Subnet(width, space.smallest.depth), config, state)
    for number, name in enumerate(launches.compile_into(cache, triton_key), 1):
        yield f"{number:>5} of {len(launches.binaries)}: {name}"
    python = f"for Python {'.'.join(platform.python_version_tuple()[:2])}"
    yield (
        f"kernels for {architecture} are in {cache}, to be used by Triton {version('triton')} "
        f"{'of the given key' if triton_key else python} only: "
        f"TRITON_CACHE_DIR={cache.name} poa pretrain ..."
    )


def warm_up_steps(subnet: Subnet, config: Config, state: TrainingState) -> None:
    """Steps with and without masks, and the forward of an evaluation."""
    schedules = Schedules.build(config.method.optim, 1, config.method.batch_size)
    with state.undisturbed():
        for masked in (True, False):
            micro_batch = micro_batch_of(noise(config), config, state, subnet, masked)
            train_step(state.student, state, config, schedules, 0, [micro_batch], observed=True)
    crops = micro_batch.batch.global_crops
    with torch.no_grad(), autocast(crops.device, config.method.precision):
        state.teacher.backbone([crops], subnet)


def noise(config: Config) -> Tensor:
    """Canvases of a micro-batch, on the CPU."""
    method = config.method
    shape = (method.batch_size, method.backbone.channels, method.canvas, method.canvas)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch_stream(0, "warm-up"))


def micro_batch_of(
    canvases: Tensor, config: Config, state: TrainingState, subnet: Subnet, masked: bool
) -> MicroBatch:
    """A micro-batch of whole canvases, made as a run makes it, where the state is."""
    method = config.method
    sizes = torch.full((len(canvases), 2), method.canvas)
    canvases = canvases.to(state.centers.cls[0].device)
    return make_micro_batch(method, state.student, canvases, sizes, subnet, Draws.of(0, 0, 0), masked=masked)
