"""The kernel benchmarks: an operator, its shape, who computes it, and what it must move.

Shapes are those of a step of ViT-L/16 with 64 images: the teacher's crops, and what stochastic depth leaves
of a student's, at widths of the intact network and of elastic ones. On a CPU the same cases run tiny, to test
the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import elastic_kernels as ek
from benchmarks.harness import Problem, Provider
from benchmarks.peers import attention as attention_peers
from benchmarks.peers import layer_norm as layer_norm_peers
from benchmarks.peers import naive
from benchmarks.peers import optimizer as optimizer_peers
from benchmarks.peers import prototypes as prototype_peers
from benchmarks.roofline.vit import attention_flops, tokens
from poa.config import preset
from poa.tribranch import Network

EPS = 1e-6
Groups = tuple[tuple[int, int], ...]


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
)


@dataclass(frozen=True)
class Case:
    """A kernel benchmark.

    Attributes:
        name: of the operator.
        about: one line.
        build: problems on a device for a crop group set and a width.
        crops: names of the crop groups it is measured on.
        of: what it is measured for: every width, numbers of prototypes, or the network as a whole.
    """

    name: str
    about: str
    build: Callable[[torch.device, Sizes, Groups, int], Problem]
    crops: tuple[str, ...] = ("student",)
    of: Literal["widths", "heads", "network"] = "widths"

    def problems(self, device: torch.device, sizes: Sizes) -> Iterator[Callable[[], Problem]]:
        """One at a time: inputs are made when called."""
        numbers = {"widths": sizes.widths, "heads": sizes.prototypes, "network": (sizes.largest,)}[self.of]
        for name in self.crops:
            for width in numbers:
                yield partial(self.build, device, sizes, sizes.crops[name], width)


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)


def _shape(groups: Groups, *numbers: int) -> str:
    crops = "+".join(f"{count}x{length}" for count, length in groups)
    return f"{crops} {'x'.join(map(str, numbers))}"


def _compiled(provider: Provider) -> Callable[[], Provider]:
    def make() -> Provider:
        torch._dynamo.reset()  # a graph for this shape alone
        return torch.compile(provider, dynamic=False)

    return make


def _bytes(dtype: torch.dtype, forward: float, backward: float) -> dict[str, float]:
    """From elements moved."""
    size = dtype.itemsize
    return {"fwd": size * forward, "bwd": size * backward, "fwd+bwd": size * (forward + backward)}


def _providers(
    ours: Provider, naive_one: Provider, **more: Callable[[], Provider]
) -> dict[str, Callable[[], Provider]]:
    return {"ours": lambda: ours, "naive": lambda: naive_one, "compiled": _compiled(naive_one), **more}


def layer_norm(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, dtype = tokens(groups), sizes.dtype
    leaves = {
        "x": draw(device, dtype, rows, width),
        "weight": draw(device, dtype, sizes.largest, seed=1),
        "bias": draw(device, dtype, sizes.largest, seed=2),
    }

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ek.elastic_layer_norm(x, weight, bias, EPS)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return naive.layer_norm(x, weight, bias, EPS)

    providers = _providers(ours, plain) | layer_norm_peers.peers(EPS, device)
    moved = _bytes(dtype, 2 * rows * width, 3 * rows * width)
    return Problem("layer_norm", _shape(groups, width), leaves, providers, 0.0, moved)


def attention(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, dtype = tokens(groups), sizes.dtype
    leaves = {"qkv": draw(device, dtype, rows, 3, width // sizes.head_dim, sizes.head_dim)}

    def ours(qkv: Tensor) -> Tensor:
        return ek.packed_attention(qkv, groups)

    def plain(qkv: Tensor) -> Tensor:
        return naive.attention(qkv, groups)

    providers = _providers(ours, plain) | attention_peers.peers(groups, device)
    moved = _bytes(dtype, 4 * rows * width, 8 * rows * width)
    flops = attention_flops(groups, width)
    return Problem("attention", _shape(groups, width), leaves, providers, flops, moved)


def _weight(device: torch.device, sizes: Sizes, out: int, inner: int, seed: int) -> dict[str, Tensor]:
    return {
        "weight": draw(device, sizes.dtype, out, inner, seed=seed, scale=inner**-0.5),
        "bias": draw(device, sizes.dtype, out, seed=seed + 1),
    }


def _product_bytes(dtype: torch.dtype, rows: int, out: int, inner: int) -> dict[str, float]:
    """Forward reads x and W and writes y; backward reads dy, x and W and writes dx and dW."""
    activations, weight = rows * (out + inner), out * inner
    return _bytes(dtype, activations + weight, rows * (out + 2 * inner) + 2 * weight)


def linear(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """fc1 without its GELU, and bare cuBLAS on a packed copy of the corner."""
    rows, out, most = tokens(groups), 4 * width, 4 * sizes.largest
    leaves = {"x": draw(device, sizes.dtype, rows, width), **_weight(device, sizes, most, sizes.largest, 1)}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ek.elastic_linear(x, weight, bias, out_features=out)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return naive.linear(x, weight, bias, out)

    def packed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Fast where the corner is the whole weight; elsewhere it shows what the copy costs."""
        scale = sizes.largest / width
        return F.linear(x, (weight[:out, :width] * scale).contiguous(), bias[:out])

    providers = _providers(ours, plain, packed=lambda: packed)
    moved = _product_bytes(sizes.dtype, rows, out, width)
    return Problem("linear", _shape(groups, width, out), leaves, providers, 2.0 * rows * out * width, moved)


def linear_gelu(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, out, most = tokens(groups), 4 * width, 4 * sizes.largest
    leaves = {"x": draw(device, sizes.dtype, rows, width), **_weight(device, sizes, most, sizes.largest, 1)}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ek.elastic_linear(x, weight, bias, out_features=out, activation="gelu")

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(naive.linear(x, weight, bias, out))

    moved = _product_bytes(sizes.dtype, rows, out, width)
    extra = sizes.dtype.itemsize * rows * out  # the sum before the GELU, kept and read again
    moved = {
        "fwd": moved["fwd"] + extra,
        "bwd": moved["bwd"] + extra,
        "fwd+bwd": moved["fwd+bwd"] + 2 * extra,
    }
    shape, flops = _shape(groups, width, out), 2.0 * rows * out * width
    return Problem("linear_gelu", shape, leaves, _providers(ours, plain), flops, moved)


def qkv(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, largest = tokens(groups), sizes.largest
    leaves = {"x": draw(device, sizes.dtype, rows, width), **_weight(device, sizes, 3 * largest, largest, 1)}
    moved = _product_bytes(sizes.dtype, rows, 3 * width, width)
    flops = 2.0 * rows * 3 * width * width
    providers = _providers(ek.elastic_qkv, naive.qkv)
    return Problem("qkv", _shape(groups, width, 3 * width), leaves, providers, flops, moved)


def linear_residual(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """proj with bias, LayerScale and residual."""
    rows, largest = tokens(groups), sizes.largest
    leaves = {
        "x": draw(device, sizes.dtype, rows, width),
        **_weight(device, sizes, largest, largest, 1),
        "residual": draw(device, sizes.dtype, rows, width, seed=3),
        "gamma": draw(device, sizes.dtype, largest, seed=4),
    }

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
        return naive.residual(residual, naive.linear(x, weight, bias, width), gamma, None)

    moved = _product_bytes(sizes.dtype, rows, width, width)
    extra = sizes.dtype.itemsize * rows * width
    moved = {"fwd": moved["fwd"] + extra, "bwd": moved["bwd"], "fwd+bwd": moved["fwd+bwd"] + extra}
    shape, flops = _shape(groups, width, width), 2.0 * rows * width * width
    providers = _providers(ek.elastic_linear_residual, plain)
    return Problem("linear_residual", shape, leaves, providers, flops, moved)


def mlp(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, largest, most = tokens(groups), sizes.largest, 4 * sizes.largest
    first, second = _weight(device, sizes, most, largest, 1), _weight(device, sizes, largest, most, 3)
    leaves = {
        "x": draw(device, sizes.dtype, rows, width),
        "fc1": first["weight"],
        "b1": first["bias"],
        "fc2": second["weight"],
        "b2": second["bias"],
    }

    def ours(x: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor, b2: Tensor) -> Tensor:
        return ek.elastic_mlp(x, fc1, b1, fc2, b2)

    hidden, flops = 4 * width, 16.0 * rows * width * width
    one, two = (_product_bytes(sizes.dtype, rows, *s) for s in ((hidden, width), (width, hidden)))
    moved = {mode: one[mode] + two[mode] for mode in one}
    return Problem("mlp", _shape(groups, width, hidden), leaves, _providers(ours, naive.mlp), flops, moved)


def block(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """A whole block; its bytes are the cost model's."""
    largest, rows = sizes.largest, tokens(groups)
    with torch.device(device):
        module = ek.ElasticBlock(largest, 4 * largest, sizes.head_dim, layer_scale=0.1).to(sizes.dtype)
    leaves = {"x": draw(device, sizes.dtype, rows, width)}
    leaves |= {name.replace(".", "_"): p.detach() for name, p in module.named_parameters()}
    names = {name.replace(".", "_"): name for name, _ in module.named_parameters()}

    def with_forward(forward: Callable[..., Tensor]) -> Provider:
        def provider(x: Tensor, **parameters: Tensor) -> Tensor:
            found = {names[name]: tensor for name, tensor in parameters.items()}
            with torch.nn.utils.stateless._reparametrize_module(module, found):
                return forward(module, x, groups)

        return provider

    flops = 24.0 * rows * width * width + attention_flops(groups, width)
    weights = 12 * width * width
    # Forward: 2 norms, qkv, attention, proj, fc1, fc2 in and out; backward about twice, saved tensors read.
    moved = _bytes(sizes.dtype, 33 * rows * width + weights, 62 * rows * width + 2 * weights)
    ours, plain = with_forward(ek.ElasticBlock.forward), with_forward(naive.block)
    return Problem("block", _shape(groups, width), leaves, _providers(ours, plain), flops, moved)


def prototype_losses(device: torch.device, sizes: Sizes, groups: Groups, count: int) -> Problem:
    """Masked patches of both students; the naive way keeps every logit and target."""
    rows, dim = sizes.masked, sizes.bottleneck
    dtype = torch.float16 if sizes.dtype == torch.bfloat16 else sizes.dtype
    leaves = {
        "x1": F.normalize(draw(device, torch.float32, rows, dim), dim=1).to(dtype),
        "x2": F.normalize(draw(device, torch.float32, rows, dim, seed=1), dim=1).to(dtype),
        "weight": F.normalize(draw(device, torch.float32, count, dim, seed=2), dim=1).to(dtype),
    }
    teacher = draw(device, torch.float32, rows, count, seed=3).tanh().to(dtype)
    scale = draw(device, torch.float32, count, seed=4)
    own = torch.arange(rows, device=device)
    index = torch.stack([own, torch.full_like(own, -1)], dim=1)

    def ours(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
        losses = ek.prototype_cross_entropy([x1, x2], weight, teacher, scale, index, teacher_temperature=0.05)
        return torch.stack(losses)

    def plain(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x1.dtype, torch.float32)
        target = torch.softmax(teacher.to(wide) / 0.05 + scale, dim=-1)
        s1, s2 = (torch.log_softmax(F.linear(x, weight).to(wide) / 0.1, dim=-1) for x in (x1, x2))
        return torch.stack(
            [-(q * s).sum(-1) for q, s in ((target, s1), (target, s2), (s1.detach().exp(), s2))]
        )

    flops, size = 4.0 * rows * count * dim, dtype.itemsize
    forward = size * (2 * rows * dim + count * dim + rows * count)
    moved = {"fwd": forward, "bwd": 2.0 * forward + 4 * size * rows * count, "fwd+bwd": 0.0}
    moved["fwd+bwd"] = moved["fwd"] + moved["bwd"]
    shape = f"2x{rows} {dim}x{count}"
    providers = _providers(ours, plain, liger=prototype_peers.liger)
    return Problem("prototype_losses", shape, leaves, providers, flops, moved)


def sinkhorn(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """Three iterations; the naive way keeps the assignments in fp32 and normalises them in place."""
    dtype = torch.float16 if sizes.dtype == torch.bfloat16 else sizes.dtype
    counts = preset(sizes.preset).method.head.prototypes
    shapes = [(rows, count) for rows in (2 * sizes.images, sizes.masked) for count in counts]
    leaves = {
        f"logits_{n}": draw(device, torch.float32, *shape, seed=n).tanh().to(dtype)
        for n, shape in enumerate(shapes)
    }

    def ours(**logits: Tensor) -> Tensor:
        return torch.cat(ek.sinkhorn_scaling(list(logits.values()), 0.05))

    def plain(**logits: Tensor) -> Tensor:
        return torch.cat([naive.sinkhorn(t, 0.05) for t in logits.values()])

    elements = sum(rows * count for rows, count in shapes)
    moved = {"fwd": 5.0 * dtype.itemsize * elements}  # every row sum and column sum reads all of them
    shape = f"{'+'.join(str(rows) for rows in (2 * sizes.images, sizes.masked))} {'+'.join(map(str, counts))}"
    return Problem("sinkhorn", shape, leaves, _providers(ours, plain), 0.0, moved, trains=False)


def optimizer(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    method = preset(sizes.preset).method
    with torch.device("meta"):
        counts = [p.numel() for p in Network(method.backbone, method.head).parameters()]
    padded = [-(-count // 4) * 4 for count in counts]  # tensors of their own begin at multiples of 16 bytes
    names = ("params", "grads", "averages")
    leaves = {name: draw(device, torch.float32, sum(padded), seed=n) for n, name in enumerate(names)}
    # Gradients twice; weights, moments and average read and written; two copies written.
    moved = {"fwd": (10.0 * torch.float32.itemsize + 2 * torch.bfloat16.itemsize) * sum(padded)}
    shape = f"{sum(counts)} in {len(counts)}"
    return Problem("optimizer", shape, leaves, optimizer_peers.providers(padded), 0.0, moved, trains=False)


CASES: Sequence[Case] = (
    Case("layer_norm", "LayerNorm with affine", layer_norm),
    Case("attention", "attention within packed crops", attention, ("teacher", "student")),
    Case("linear", "fc1 with bias, nothing fused; `packed` is cuBLAS on a copy of the corner", linear),
    Case("linear_gelu", "fc1 with bias and exact GELU", linear_gelu),
    Case("qkv", "projections of the first heads, three corners of one weight", qkv),
    Case("linear_residual", "proj with bias, LayerScale and residual", linear_residual),
    Case("mlp", "fc1, GELU, fc2", mlp),
    Case("block", "a transformer block", block),
    Case(
        "prototype_losses",
        "losses of both students' masked patches with a head",
        prototype_losses,
        of="heads",
    ),
    Case("sinkhorn", "scaling vectors of all heads, class tokens and patches", sinkhorn, of="network"),
    Case(
        "optimizer", "clipping, AdamW, moving average and bf16 copies of all weights", optimizer, of="network"
    ),
)
