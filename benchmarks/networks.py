"""Subnets as networks side by side: elastic, naively sliced, and static ones of the same size.

Weights and images are in one dtype, bf16 on a GPU. Features are compared first, with those of the plain
definitions in fp32; a provider whose features differ is refused. What elasticity costs is the distance from
`ours` to `static`, the same subnet with weights of its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.failures import Event, Failures, Refused, Trying, Unavailable
from benchmarks.harness import peak_mib
from benchmarks.peers import naive, timm_networks
from benchmarks.results import Row, place
from benchmarks.step import config_of, middle
from elastic_kernels import backend
from poa.backbones import Backbone, BackboneConfig
from poa.subnets import SearchSpace, Subnet

PROVIDERS = ("ours", "reference", "naive", "compiled", "static", "timm", "timm compiled")
SUBNETS: dict[str, Callable[[SearchSpace], Subnet]] = {
    "smallest": lambda space: space.smallest,
    "middle": middle,
    "intact": lambda space: space.intact,
}
# Of the features, relative to their norm: bf16 of a CPU is 0.003 to 0.006 off in all three presets.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def run(
    name: str, which: str, images: int, device: torch.device, seconds: float, without: Collection[str] = ()
) -> Iterator[Event]:
    """Measure a subnet (smallest, middle or intact) of a preset, forward, and with backward to all weights.

    Without a GPU a tiny network stands in. Images have the size of global crops; each of the providers and
    modes is measured for so many seconds. Raises DeviceLost: a provider left the device unusable.
    """
    config = config_of(name, device).method.backbone
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    elastic, subnet = copy.deepcopy(_built(config)).to(device), SUBNETS[which](config.space)
    generator = torch.Generator(device).manual_seed(0)
    shape = (images if device.type == "cuda" else 2, 3, config.image_size, config.image_size)
    crops, failures = torch.randn(shape, device=device, generator=generator), Failures()
    with backend("reference"), torch.no_grad():
        expected = elastic([crops], subnet)[0].cls
    for peer in PROVIDERS:
        if peer in without:
            continue
        yield Trying(peer)
        with failures.of(peer), provider(peer, elastic, subnet, dtype) as network:
            refuse_another_function(network, crops.to(dtype), expected)
            yield from measure(peer, network, config, subnet, crops.to(dtype), seconds)
        if peer in failures:
            yield Refused(peer, failures[peer])


@functools.lru_cache(maxsize=1)
def _built(config: BackboneConfig) -> Backbone:
    return config.build(torch.Generator().manual_seed(0)).eval()  # on the CPU, which takes it seconds


def label_of(config: BackboneConfig, subnet: Subnet, images: int) -> str:
    return f"{config.kind} {subnet} {images}x{config.image_size}px"


@dataclass(frozen=True)
class Candidate:
    """A network to be measured: features of images `[B, 3, H, W]`, weights that get gradients, and whether
    its function is the `same` as the subnet's."""

    features: Callable[[Tensor], Tensor]
    weights: list[nn.Parameter]
    same: bool


def refuse_another_function(network: Candidate, crops: Tensor, expected: Tensor) -> None:
    """Raise `Unavailable` where the features should be these and are not."""
    with torch.no_grad():
        worst = float((network.features(crops).float() - expected).norm() / expected.norm())
    if network.same and not worst <= TOLERANCE[crops.dtype]:
        raise Unavailable(f"its features differ by {worst:.1e}")


@contextlib.contextmanager
def provider(which: str, elastic: Backbone, subnet: Subnet, dtype: torch.dtype) -> Iterator[Candidate]:
    """A network with weights of this dtype, on the device of the elastic one."""
    device = next(elastic.parameters()).device
    if which.startswith("timm"):
        model, same = timm_networks.build(elastic.to_static(subnet))
        model = model.to(device, dtype)
        features = torch.compile(model, dynamic=False) if which == "timm compiled" else model
        yield Candidate(features, list(model.parameters()), same)
        return
    network = copy.deepcopy(elastic.to_static(subnet) if which == "static" else elastic).to(device, dtype)
    with contextlib.ExitStack() as stack:
        if which == "reference":
            stack.enter_context(backend("reference"))
        elif which in ("naive", "compiled"):
            stack.enter_context(naive.installed(compiled=which == "compiled"))
        yield Candidate(lambda x: network([x], subnet)[0].cls, list(network.parameters()), True)


def measure(
    which: str, network: Candidate, config: BackboneConfig, subnet: Subnet, crops: Tensor, seconds: float
) -> Iterator[Row]:
    """Rows of a provider, with its launches: forward, and forward with the gradients of its weights."""
    device = crops.device

    def forward() -> None:
        with torch.no_grad():
            network.features(crops)

    def both() -> None:
        loss = network.features(crops).float().square().sum()
        torch.autograd.grad(loss, network.weights, allow_unused=True)  # what the subnet leaves out gets none

    for mode, call, times_flops in (("fwd", forward, 1), ("fwd+bwd", both, 3)):
        call()  # compiles, allocates
        memory = peak_mib(call, device)
        samples = timing.interleaved({which: timing.timed(call)}, device, seconds, hide=False)[which]
        spread = timing.quantiles(samples.seconds)
        taken, flops = spread["p50"] / 1e6, times_flops * len(crops) * config.flops(subnet)
        row: Row = {"op": "network", "provider": which, "mode": mode, **spread}
        row |= {"shape": label_of(config, subnet, len(crops)), "dtype": str(crops.dtype).partition(".")[2]}
        row |= {"images_per_s": len(crops) / taken, "tflop_per_s": flops / taken / 1e12, "peak_mib": memory}
        yield row | place(device.type)
