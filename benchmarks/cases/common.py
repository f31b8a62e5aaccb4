"""Sizes of the cases, and what their builders share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.harness import Provider

Groups = tuple[tuple[int, int], ...]
M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Sizes:
    """Of all cases.

    Attributes:
        widths: of the subnets measured.
        largest: of the shared weights.
        head_dim: channels of a head.
        crops: crop groups by name.
        dtype: of every tensor; the products of prototypes are in float16 where it is bfloat16.
        masked: patches that learn from the teacher's.
        prototypes, bottleneck: of a head.
        preset: whose parameters the optimiser steps, and whose heads Sinkhorn normalises.
        images: of a step.
        maps: of the first stages of a Swin and of a ResNet, which halve from stage to stage.
        stages: of both that are measured.
        pyramid: width of their first stages: of the shared weights, and of the subnet measured.
        window: side of a window.
        norm_groups: of a group norm.
    """

    widths: tuple[int, ...]
    largest: int
    head_dim: int
    crops: dict[str, Groups]
    dtype: torch.dtype
    masked: int
    prototypes: tuple[int, ...]
    bottleneck: int
    preset: str
    images: int
    maps: tuple[tuple[int, int, int], ...]
    stages: tuple[int, ...]
    pyramid: tuple[int, int]
    window: int
    norm_groups: int


REAL = Sizes(
    widths=(1024, 640, 384),
    largest=1024,
    head_dim=64,
    crops={"student": ((102, 197), (409, 37)), "teacher": ((128, 197),)},
    dtype=torch.bfloat16,
    masked=3726,
    prototypes=(8192, 65536),
    bottleneck=256,
    preset="vit-l16",
    images=64,
    maps=((128, 24, 24), (32, 56, 56)),  # 16 images
    stages=(0, 2),
    pyramid=(128, 96),
    window=7,
    norm_groups=32,
)
ALL_WIDTHS = tuple(range(1024, 383, -64))
TINY = Sizes(
    widths=(32, 16),
    largest=32,
    head_dim=16,
    crops={"student": ((3, 7), (4, 3)), "teacher": ((2, 7),)},
    dtype=torch.float32,
    masked=5,
    prototypes=(40,),
    bottleneck=8,
    preset="quickstart",
    images=3,
    maps=((2, 5, 5), (1, 4, 4)),
    stages=(0, 1),
    pyramid=(32, 16),
    window=3,
    norm_groups=4,
)


def sizes_of(device: torch.device, all_widths: bool) -> Sizes:
    """Real ones on a GPU, on request at every width; tiny ones elsewhere."""
    if device.type != "cuda":
        return TINY
    return dataclasses.replace(REAL, widths=ALL_WIDTHS) if all_widths else REAL


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)


def shape_of(groups: Groups, *numbers: int) -> str:
    crops = "+".join(f"{count}x{length}" for count, length in groups)
    return f"{crops} {'x'.join(map(str, numbers))}"


def _compiled(provider: Provider) -> Callable[[], Provider]:
    def make() -> Provider:
        torch._dynamo.reset()  # a graph for this shape alone
        return torch.compile(provider, dynamic=False)

    return make


def bytes_of(dtype: torch.dtype, forward: float, backward: float) -> dict[str, float]:
    """From elements moved."""
    size = dtype.itemsize
    return {"fwd": size * forward, "bwd": size * backward, "fwd+bwd": size * (forward + backward)}


def providers_of(
    ours: Provider, naive_one: Provider, **more: Callable[[], Provider]
) -> dict[str, Callable[[], Provider]]:
    return {"ours": lambda: ours, "naive": lambda: naive_one, "compiled": _compiled(naive_one), **more}


def of_module(
    module: torch.nn.Module, forward: Callable[..., Tensor], *arguments: object
) -> Callable[..., Tensor]:
    """A provider of `x` and `leaves_of(module)`: a forward of the module on `x` and the arguments."""
    names = {name.replace(".", "_"): name for name, _ in module.named_parameters()}

    def provider(x: Tensor, **parameters: Tensor) -> Tensor:
        replaced = {names[name]: tensor for name, tensor in parameters.items()}
        with torch.nn.utils.stateless._reparametrize_module(module, replaced):
            return forward(module, x, *arguments)

    return provider


def made(make: Callable[[], M], device: torch.device, sizes: Sizes) -> M:
    """A module on a device, in the dtype of the sizes."""
    with torch.device(device):
        return make().to(sizes.dtype)


def leaves_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters by names that are arguments."""
    return {name.replace(".", "_"): p.detach() for name, p in module.named_parameters()}
