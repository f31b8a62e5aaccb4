"""Other ways to clip, take a step of AdamW, move an average of the weights and round both to bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.failures import Unavailable, require_cuda
from benchmarks.harness import Provider
from elastic_kernels import FusedAdamW, working_weights

CLIP, MOMENTUM = 1.0, 0.5
RATES: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
Step = Callable[[], object]
MakeStep = Callable[[list[nn.Parameter], list[Tensor]], Step]


def provider(sizes: Sequence[int], make: MakeStep) -> Provider:
    """A step of tensors cut out of flat ones; what it changes is its own and stays from call to call."""
    ready: dict[torch.dtype, tuple[Step, Tensor]] = {}

    def step(params: Tensor, grads: Tensor, averages: Tensor) -> Tensor:
        if params.dtype not in ready:
            weights, average = params.clone(), averages.clone()
            leaves = [nn.Parameter(part) for part in weights.split(list(sizes))]
            for leaf, grad in zip(leaves, grads.clone().split(list(sizes)), strict=True):
                leaf.grad = grad
            ready[params.dtype] = make(leaves, list(average.split(list(sizes)))), average
        take, average = ready[params.dtype]
        take()
        return average

    return step


def ours(leaves: list[nn.Parameter], averages: list[Tensor]) -> Step:
    pairs: dict[Tensor, Tensor] = dict(zip(leaves, averages, strict=True))
    optimizer = FusedAdamW(leaves, **RATES, averages=pairs)
    rounded = working_weights([*leaves, *averages], torch.bfloat16)

    def steps() -> Iterator[None]:
        with optimizer.writing(rounded):
            while True:
                optimizer.step(max_norm=CLIP, momentum=MOMENTUM)
                with rounded:
                    yield

    return partial(next, steps())


def _separate(optimizer: torch.optim.Optimizer, leaves: list[nn.Parameter], averages: list[Tensor]) -> Step:
    sources = [leaf.detach() for leaf in leaves]
    copies = [t.to(torch.bfloat16) for t in (*sources, *averages)]

    def step() -> None:
        nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        torch._foreach_lerp_(averages, sources, 1 - MOMENTUM)
        torch._foreach_copy_(copies, [*sources, *averages])

    return step


def plain(leaves: list[nn.Parameter], averages: list[Tensor]) -> Step:
    """PyTorch's, list by list."""
    return _separate(torch.optim.AdamW(leaves, **RATES, foreach=True), leaves, averages)


def torch_fused(leaves: list[nn.Parameter], averages: list[Tensor]) -> Step:
    return _separate(torch.optim.AdamW(leaves, **RATES, fused=True), leaves, averages)


def apex(leaves: list[nn.Parameter], averages: list[Tensor]) -> Step:
    """NVIDIA Apex (from source; the package of that name on the index is another)."""
    require_cuda(leaves[0].device)
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise Unavailable(f"apex.optimizers does not import: {error}") from None
    return _separate(FusedAdam(leaves, **RATES, adam_w_mode=True), leaves, averages)


def providers(sizes: Sequence[int]) -> dict[str, Callable[[], Provider]]:
    """All of them, by name."""
    every = {"ours": ours, "naive": plain, "torch-fused": torch_fused, "apex": apex}
    return {name: partial(provider, sizes, make) for name, make in every.items()}
