"""Inputs and truth of the tests of the embedding, interpreted and on a GPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from elastic_kernels import ElasticConv1x1, ElasticPatchEmbed, EmbeddingWeights, backend, elastic_embedding
from helpers.kernels.numerics import assert_kernels_accurate, draw


def assert_accurate(
    width: int,
    largest: int,
    registers: int,
    masked: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    crops: int = 3,
) -> None:
    """Tokens and gradients of a group with other positions and of one with the trained ones, masked."""
    tensors: list[Tensor | None] = [
        draw(largest, 3, 2, 2), draw(largest), draw(1, 1, largest),
        draw(1, registers, largest) if registers else None,
        draw(1, 1 + registers + 6, largest), draw(1, largest) if masked else None,
    ]  # fmt: skip
    images = [draw(crops + 1, 3, 4, 2), draw(crops, 3, 4, 6)]
    resizings = [draw(2, 6).to(device), None]
    masks = [None, (draw(crops, 6) > 0).to(device) if masked else None]
    images, tensors = ([t if t is None else t.to(device, dtype) for t in part] for part in (images, tensors))
    tokens = sum(len(c) * (1 + registers + n) for c, n in zip(images, (2, 6), strict=True))

    def run(name: str, wide: torch.dtype) -> list[Tensor]:
        leaves = [t if t is None else t.to(wide).requires_grad_() for t in tensors]
        with backend(name):
            x = elastic_embedding(
                [c.to(wide) for c in images], EmbeddingWeights(*leaves), width,
                masks=masks, resizings=resizings,
            )  # fmt: skip
            dx = draw(tokens + 1, width, seed=2)[1:].to(x)
            return [x.detach(), *torch.autograd.grad(x, [t for t in leaves if t is not None], dx)]

    for gradient in assert_kernels_accurate(run, dtype)[3:]:
        assert not gradient[..., width:].any()


LAYERS = ("patches", "patches-of-nothing", "conv1x1")


def assert_layer_accurate(kind: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Output and gradients of a module that is no part of a block, 21 of 33 wide."""
    torch.manual_seed(0)
    layer: torch.nn.Module = ElasticConv1x1(33, 40) if kind == "conv1x1" else ElasticPatchEmbed(2, 33)
    images = draw(0 if kind == "patches-of-nothing" else 3, 3, 4, 6)
    x, size = (draw(3, 5, 7, 21).permute(0, 3, 1, 2), 30) if kind == "conv1x1" else (images, 21)
    layer, x = layer.to(device, dtype), x.to(device, dtype)

    def run(name: str, kind: torch.dtype) -> list[Tensor]:
        module, leaf = copy.deepcopy(layer).to(kind), x.to(kind).requires_grad_()
        with backend(name):
            y = module(leaf, size)
            dy = draw(*y.shape, seed=2).to(device, dtype).to(kind)
            return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], dy)]

    assert_kernels_accurate(run, dtype)
