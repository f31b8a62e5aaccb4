"""The kernel benchmarks: an operator, its shape, who computes it, and what it must move.

Shapes are those of a step of ViT-L/16 with 64 images: the teacher's crops, and what stochastic depth leaves
of a student's, at widths of the intact network and of elastic ones; and those of two stages of Swin-B and
ResNet-152 with 16 images. On a CPU the same cases run tiny, to test the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from benchmarks.cases import designs, method, mixed_width, pyramids, transformer
from benchmarks.cases.common import REAL, TINY, Groups, Sizes, draw, sizes_of
from benchmarks.harness import Problem

__all__ = ["CASES", "REAL", "TINY", "Case", "Sizes", "draw", "sizes_of"]


@dataclass(frozen=True)
class Case:
    """A kernel benchmark.

    Attributes:
        name: of the operator.
        about: one line.
        build: problems on a device for a crop group set and a width.
        crops: names of the crop groups it is measured on.
        of: what it is measured for: every width, numbers of prototypes, the network as a whole, or stages of
            a Swin or ResNet, which have maps of their own.
    """

    name: str
    about: str
    build: Callable[[torch.device, Sizes, Groups, int], Problem]
    crops: tuple[str, ...] = ("student",)
    of: Literal["widths", "heads", "network", "stages"] = "widths"

    def problems(self, device: torch.device, sizes: Sizes) -> Iterator[Callable[[], Problem]]:
        """One at a time: inputs are made when called."""
        for name in self.crops:
            for number in self._numbers(sizes):
                yield partial(self.build, device, sizes, sizes.crops[name], number)

    def labels(self, sizes: Sizes) -> Iterator[tuple[str, int]]:
        """Of each problem its name, and the rank of its width among all."""
        for name in self.crops:
            for rank, number in enumerate(self._numbers(sizes)):
                yield f"{name} {number}", rank

    def _numbers(self, sizes: Sizes) -> tuple[int, ...]:
        return {
            "widths": sizes.widths,
            "heads": sizes.prototypes,
            "network": (sizes.largest,),
            "stages": sizes.stages,
        }[self.of]


CASES: Sequence[Case] = (
    Case("layer_norm", "LayerNorm with affine", transformer.layer_norm),
    Case("attention", "attention within packed crops", transformer.attention, ("teacher", "student")),
    Case(
        "linear",
        "fc1 with bias, nothing fused; `packed` is cuBLAS on a copy of the corner",
        transformer.linear,
    ),
    Case("linear_gelu", "fc1 with bias and exact GELU", transformer.linear_gelu),
    Case("qkv", "projections of the first heads, three corners of one weight", transformer.qkv),
    Case("linear_residual", "proj with bias, LayerScale and residual", transformer.linear_residual),
    Case("mlp", "fc1, GELU, fc2", transformer.mlp),
    Case("block", "a transformer block", transformer.block),
    Case("rms_norm", "RMSNorm with a weight", designs.rms_norm),
    Case("swiglu", "a gated MLP; gate and units are two prefixes of one weight", designs.swiglu),
    Case("nested_mlp", "MatFormer: nested hidden units of the whole width", designs.nested_mlp),
    Case("mixed_linear", "rows of two widths in one layer", mixed_width.mixed_linear),
    Case("mixed_norm", "LayerNorm of rows of two widths", mixed_width.mixed_norm),
    Case("mixed_mlp", "an MLP on rows of two widths", mixed_width.mixed_mlp),
    Case("mixed_attention", "attention, half of the sequences with fewer heads", mixed_width.mixed_attention),
    Case("mixed_block", "a block, half of the sequences at a width of their own", mixed_width.mixed_block),
    Case("patch_embed", "patches to tokens", designs.patch_embed),
    Case("conv1x1", "a 1x1 convolution of channels-last maps", designs.conv1x1),
    Case("qk_norm", "RMSNorm of queries and keys, and a rotary embedding", designs.qk_norm),
    Case("offsets", "attention of sequences given by offsets", designs.offsets, ("teacher", "student")),
    Case(
        "window_attention",
        "attention within shifted windows of padded maps",
        pyramids.window_attention,
        of="stages",
    ),
    Case("swin_block", "a Swin block with shifted windows", pyramids.swin_block, of="stages"),
    Case("group_norm", "group norm with residual and ReLU, channels last", pyramids.group_norm, of="stages"),
    Case("bottleneck", "a bottleneck of a ResNet with group norm", pyramids.bottleneck, of="stages"),
    Case(
        "prototype_losses",
        "losses of both students' masked patches with a head",
        method.prototype_losses,
        of="heads",
    ),
    Case("sinkhorn", "scaling vectors of all heads, class tokens and patches", method.sinkhorn, of="network"),
    Case(
        "optimizer",
        "clipping, AdamW, moving average and bf16 copies of all weights",
        method.optimizer,
        of="network",
    ),
)
