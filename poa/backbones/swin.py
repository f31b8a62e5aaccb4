"""Elastic Swin transformer: windows of a map attend within themselves, maps halve between stages.

Stage `i` has `2**i` times the width of the first one; depths are chosen by stage. The maps of all crops are
packed into one `[tokens, w]` tensor, so that everything but patches and windows is one launch for all crops.

Parameter names are timm's, but for stages, whose `downsample` stands at their end. Source: Swin Transformer
(Liu et al., 2021); POA (Zhang et al., ECCV 2024); official `DynamicSwinTransformer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kernels import (
    ElasticLayerNorm,
    ElasticSwinBlock,
    KeptRows,
    autocast_operands,
    elastic_layer_norm,
    elastic_linear,
    recomputed,
)
from poa.backbones.base import Features, Inputs, copied, count_of, initialise_as_torch
from poa.backbones.pyramid import Pyramid, PyramidConfig
from poa.errors import InputError
from poa.multicrop import StochasticDepth, draw_samples
from poa.options import option
from poa.subnets import Subnet
from poa.weights import load_strictly

LAYER_NORM_EPS = 1e-5

Maps = list[tuple[int, int, int]]
"""`(crops, height, width)` of each crop group, in packing order."""


@dataclass(frozen=True)
class SwinConfig(PyramidConfig):
    """Shape of an elastic Swin transformer, and its search space.

    Example:
        >>> from poa import SwinConfig
        >>> space = SwinConfig(max_width=128, max_depths=(2, 2, 18, 2)).space
        >>> len(space), str(space.smallest), str(space.intact)
        (39, '96x2-2-6-2', '128x2-2-18-2')
    """

    marker: ClassVar[str] = "stages.0.blocks.0.norm1.weight"
    unit_option: ClassVar[str] = "head_dim"
    kind: Literal["swin"] = option("swin", "Swin transformer")
    patch_size: int = option(4, "pixels of a side of a patch", "[1, 1024]")
    head_dim: int = option(16, "channels of an attention head", "[1, 1024]")
    window: int = option(7, "side of an attention window, in tokens", "[2, 64]")
    mlp_ratio: float = option(4.0, "hidden units of the MLP over the width", "(0, 64]")
    drop_path: float = option(0.2, "stochastic-depth rate of the last block, from 0 at the first", "[0, 1)")
    embedding_width: int | None = option(
        None, "channels of the patch embedding and of its norm; none: max_width", "[1, 16384]"
    )
    shifted: tuple[tuple[bool, ...], ...] | None = option(
        None, "which blocks of each stage shift their windows; none: every second"
    )

    def check(self) -> None:
        super().check()
        if self.embedding < self.max_width:
            raise self.wrong("embedding_width", f"at least max_width {self.max_width}")
        if int(self.mlp_ratio * self.min_width) < 1:
            raise self.wrong("mlp_ratio", f"at least one hidden unit at min_width {self.min_width}")
        if self.shifted is not None and tuple(map(len, self.shifted)) != self.max_depths:
            raise self.wrong("shifted", f"as many flags as max_depths {self.max_depths}")

    @property
    def first_stride(self) -> int:
        return self.patch_size

    @property
    def embedding(self) -> int:
        """Channels of the patch embedding before the first `w` are taken."""
        return self.embedding_width or self.max_width

    def shifts(self, stage: int) -> tuple[bool, ...]:
        """Which blocks of a stage shift their windows."""
        if self.shifted is not None:
            return self.shifted[stage]
        return tuple(index % 2 == 1 for index in range(self.max_depths[stage]))

    def active_drop_rates(self, subnet: Subnet) -> list[float]:
        """Stochastic-depth rate of each active block of all stages, linear over the intact depth."""
        rates = torch.linspace(0, self.drop_path, sum(self.max_depths)).split(list(self.max_depths))
        return [float(r) for stage, rate in enumerate(rates) for r in rate[self.active(subnet, stage)]]

    def feature_width(self, subnet: Subnet) -> int:
        return subnet.width * 2 ** (len(self.max_depths) - 1)

    def parameters(self, subnet: Subnet) -> int:
        w, table = subnet.width, (2 * self.window - 1) ** 2
        total = self.embedding * (self.channels * self.patch_size**2 + 3) + 2 * self.feature_width(subnet)
        for stage, depth in enumerate(subnet.blocks):
            hidden = int(w * self.mlp_ratio)
            linears = 4 * w * w + 4 * w + 2 * w * hidden + hidden + w
            total += depth * (linears + 4 * w + table * (w // self.head_dim))
            total += (8 * w + 8 * w * w) * (stage < len(subnet.blocks) - 1)  # patch merging
            w *= 2
        return total

    def embedding_flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        return 2 * self.sides(image_size)[0] ** 2 * self.channels * self.patch_size**2 * self.embedding

    def flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        w, total = subnet.width, self.embedding_flops(subnet, image_size)
        sides = self.sides(image_size)
        for side, depth in zip(sides, subnet.blocks, strict=True):
            linears = 2 * side**2 * (4 * w * w + 2 * w * int(w * self.mlp_ratio))
            windows = (-(-side // self.window)) ** 2
            total += depth * (linears + windows * 4 * self.window**4 * w)
            w *= 2
        for stage, side in enumerate(sides[1:]):
            total += 2 * side**2 * 8 * (subnet.width * 2**stage) ** 2
        return total

    def build(self, generator: torch.Generator | None = None) -> ElasticSwin:
        return ElasticSwin(self, generator)

    def of_one_size(self, subnet: Subnet, image_size: int | None = None) -> SwinConfig:
        """As `PyramidConfig.of_one_size`; keeps which blocks shift, and all channels of the embedding."""
        shifts = (
            tuple(self.shifts(stage)[i] for i in self.active(subnet, stage))
            for stage in range(len(self.max_depths))
        )
        plain = dataclasses.replace(self, shifted=None)  # whose flags are of the largest depths
        return dataclasses.replace(
            super(SwinConfig, plain).of_one_size(subnet, image_size),
            drop_path=0.0,
            embedding_width=self.embedding,
            shifted=tuple(shifts),
        )

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], head_dim: int, norm_groups: int) -> SwinConfig:
        offsets, heads = state["stages.0.blocks.0.attn.relative_position_bias_table"].shape
        embedding, channels, _, patch = state["patch_embed.proj.weight"].shape
        depths = tuple(count_of(state, f"stages.{i}.blocks.") for i in range(count_of(state, "stages.")))
        width = state["stages.0.blocks.0.norm1.weight"].shape[0]
        return cls(
            channels=channels,
            patch_size=patch,
            min_width=width // heads,
            max_width=width,
            head_dim=width // heads,
            min_depths=(1,) * len(depths),
            max_depths=depths,
            window=(round(offsets**0.5) + 1) // 2,
            mlp_ratio=state["stages.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
            embedding_width=embedding,
            masked="mask_token" in state,
        )


class PatchEmbed(nn.Module):
    """Patches to tokens, normalised over all channels; the first `w` enter the blocks (official)."""

    def __init__(self, patch_size: int, width: int, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.norm = ElasticLayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, images: Tensor, width: int) -> Tensor:
        """`[B, C, H, W]` -> maps `[B, H / patch, W / patch, width]`."""
        assert self.proj.bias is not None
        x, weight, bias = autocast_operands(images, self.proj.weight, self.proj.bias)
        maps = F.conv2d(x, weight, bias, stride=self.proj.stride).permute(0, 2, 3, 1)
        return self.norm(maps)[..., :width]


class PatchMerging(nn.Module):
    """Four neighbours of a map become one position of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(4 * width, eps=LAYER_NORM_EPS)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Neighbours `[tokens, 4 * w]`, one after the other -> `[tokens, 2 * w]`.

        A neighbour's channels are a prefix of a quarter of the parameters. What a narrower subnet uses of
        them is copied (three times in a network, weights alone), as no kernel has such columns.
        """
        width = x.shape[-1] // 4
        norm, reduction = self.corners(width)
        x = elastic_layer_norm(x, *norm, LAYER_NORM_EPS)
        return elastic_linear(x, reduction, scale=self.width / width)

    def corners(self, width: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Weight and bias of the norm, and the reduction, of a subnet."""
        norm = self.norm.weight, self.norm.bias
        if width == self.width:
            return norm, self.reduction.weight
        weight, bias = (p.view(4, -1)[:, :width].flatten() for p in norm)
        return (weight, bias), self.reduction.weight.unflatten(1, (4, -1))[: 2 * width, :, :width].flatten(1)

    def static_state(self, width: int) -> dict[str, Tensor]:
        """The corners, the offset scale folded in."""
        (weight, bias), reduction = self.corners(width)
        scale = self.width / width
        return {"norm.weight": weight, "norm.bias": bias, "reduction.weight": reduction * scale}


class Stage(nn.Module):
    """Blocks of one width, and the merging that follows them."""

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        width = config.max_width * 2**stage
        self.blocks = nn.ModuleList(
            ElasticSwinBlock(
                width, int(width * config.mlp_ratio), config.head_dim, config.window,
                config.window // 2 if shifted else 0, eps=LAYER_NORM_EPS,
            )
            for shifted in config.shifts(stage)
        )  # fmt: skip
        last = stage == len(config.max_depths) - 1
        self.downsample = None if last else PatchMerging(width)


class ElasticSwin(Pyramid):
    """An elastic Swin transformer.

    Args:
        config: shape and search space.
        generator: CPU generator of the initial weights; default torch's own.

    Example:
        >>> import torch
        >>> from poa import ElasticSwin, Subnet, SwinConfig
        >>> swin = ElasticSwin(SwinConfig(image_size=64, min_depths=(1, 1), max_depths=(1, 2)))
        >>> (features,) = swin([torch.randn(2, 3, 64, 64)], Subnet(96, (1, 1)))
        >>> features.cls.shape
        torch.Size([2, 192])
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig, generator: torch.Generator | None = None):
        super().__init__(config)
        self.patch_embed = PatchEmbed(config.patch_size, config.embedding, config.channels)
        self.mask_token = nn.Parameter(torch.zeros(1, config.max_width)) if config.masked else None
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.max_depths)))
        self.norm = ElasticLayerNorm(config.feature_width(self.space.intact), eps=LAYER_NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                initialise_as_torch(module, generator)

    def normalise(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def maps(self, inputs: Inputs) -> list[Tensor]:
        crops = zip(inputs.crops, inputs.masks, strict=True)
        subnet, drop = inputs.subnet, inputs.drop
        x, maps = _pack([self._embed(images, subnet.width, mask) for images, mask in crops])
        halves = iter(drop.blocks if drop else [None] * sum(subnet.blocks))
        for stage, blocks in self.active_stages(subnet):
            for block in blocks:
                if inputs.recompute:
                    x = recomputed(block, x, maps, next(halves))
                else:
                    x = block(x, maps, next(halves), inplace=True)
            if stage.downsample is not None:
                x, maps = _pack([_neighbours(part) for part in _unpack(x, maps)])
                x = stage.downsample(x)
        return _unpack(x, maps)

    def _embed(self, images: Tensor, width: int, mask: Tensor | None) -> Tensor:
        patch = self.config.patch_size
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise InputError(
                f"crop: expected sides divisible by patch size {patch}, got {tuple(images.shape[-2:])}"
            )
        return self._under_mask(self.patch_embed(images, width), mask)

    def active_stages(self, subnet: Subnet) -> Iterator[tuple[Stage, list[ElasticSwinBlock]]]:
        """Each stage with the blocks that a subnet runs through, in order."""
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            active = self.config.active(subnet, number)
            yield stage, [cast(ElasticSwinBlock, stage.blocks[index]) for index in active]

    def last_blocks(self, images: Tensor, subnet: Subnet, count: int) -> list[Features]:
        x, maps = _pack([self._embed(images, self.space.require(subnet).width, None)])
        outputs: list[Tensor] = []
        for stage, blocks in self.active_stages(subnet):
            outputs = [x := block(x, maps) for block in blocks]
            if stage.downsample is not None:
                x, maps = _pack([_neighbours(part) for part in _unpack(x, maps)])
                x = stage.downsample(x)
        return [self._features_of(_unpack(output, maps)[0]) for output in outputs[-count:]]

    def stage_maps(self, images: Tensor, subnet: Subnet, window: int = 0) -> list[Tensor]:
        (x, maps), ends = _pack([self._embed(images, self.space.require(subnet).width, None)]), []
        for stage, blocks in self.active_stages(subnet):
            for block in blocks:
                x = block(x, maps)
            ends += _unpack(x, maps)
            if stage.downsample is not None:
                x, maps = _pack([_neighbours(ends[-1])])
                x = stage.downsample(x)
        return [*ends[:-1], self.normalise(ends[-1])]

    def draw_stochastic_depth(
        self, crops: Sequence[Tensor], subnet: Subnet, generator: torch.Generator
    ) -> StochasticDepth | None:
        """Every crop is kept with the probability of its block, whatever the rate (official)."""
        rates = self.config.active_drop_rates(subnet)
        if not any(rates):
            return None
        patch, halves = self.config.patch_size, list[tuple[KeptRows, KeptRows]]()
        sizes = [(len(c), c.shape[-2] // patch, c.shape[-1] // patch) for c in crops]
        for depth in subnet.blocks:
            groups = tuple((count, height * width) for count, height, width in sizes)
            for _ in range(depth):
                rate = rates[len(halves)]
                halves.append((draw_samples(groups, rate, generator), draw_samples(groups, rate, generator)))
            sizes = [(count, -(-height // 2), -(-width // 2)) for count, height, width in sizes]
        return StochasticDepth(tuple(halves))

    def layers_above(self, name: str) -> int:
        depths = self.config.max_depths
        top, parts = sum(depths) + 1, name.split(".")
        if parts[0] != "stages":
            return 0 if parts[0] == "norm" else top
        stage = int(parts[1])
        if parts[2] == "downsample":  # belongs to the blocks that follow it
            return top - (sum(depths[: stage + 1]) + 1)
        return top - (sum(depths[:stage]) + int(parts[3]) + 1)

    @torch.no_grad()
    def to_static(self, subnet: Subnet, image_size: int | None = None) -> ElasticSwin:
        """As `Backbone.to_static`; the patch embedding keeps all channels, over which it is normalised."""
        network = ElasticSwin(self.config.of_one_size(self.space.require(subnet), image_size)).eval()
        state = {f"patch_embed.{name}": value for name, value in self.patch_embed.state_dict().items()}
        width = subnet.width
        for number, (stage, blocks) in enumerate(self.active_stages(subnet)):
            parts = {f"blocks.{i}": block.static_state(width) for i, block in enumerate(blocks)}
            if stage.downsample is not None:
                parts["downsample"] = stage.downsample.static_state(width)
            for part, tensors in parts.items():
                state |= {f"stages.{number}.{part}.{name}": tensor for name, tensor in tensors.items()}
            width *= 2
        features = self.config.feature_width(subnet)
        state |= {"norm.weight": self.norm.weight[:features], "norm.bias": self.norm.bias[:features]}
        load_strictly(network, copied(state), "static")
        return network


def _pack(parts: Sequence[Tensor]) -> tuple[Tensor, Maps]:
    """Maps `[crops, height, width, channels]` of each group as `[tokens, channels]`."""
    maps = [(p.shape[0], p.shape[1], p.shape[2]) for p in parts]
    return torch.cat([p.flatten(0, 2) for p in parts]), maps


def _unpack(x: Tensor, maps: Maps) -> list[Tensor]:
    """The inverse of `_pack`: views."""
    parts = x.split([crops * height * width for crops, height, width in maps])
    return [p.unflatten(0, sizes) for p, sizes in zip(parts, maps, strict=True)]


def _neighbours(x: Tensor) -> Tensor:
    """`[crops, height, width, c]` -> `[crops, height / 2, width / 2, 4 c]`, row by row; odd sides grow."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return x.transpose(2, 3).flatten(3)
