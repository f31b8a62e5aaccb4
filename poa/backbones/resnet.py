"""Elastic ResNet with group norm: the middle of a bottleneck is elastic, and the depth of every stage.

Maps are channels-last, `[crops, height, width, channels]`: there a 1x1 convolution is an elastic linear, and
group norm, ReLU and the residual addition are one operator. Outputs of blocks keep their width, so features
of all subnets have the same one.

Parameter names are timm's with `norm` for its `bn`. Source: He et al., 2016; POA (Zhang et al., ECCV 2024);
official `DynamicResNet`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kernels import ElasticBottleneck, ElasticGroupNorm, conv_channels_last, recomputed
from poa.backbones.base import Features, Inputs, TimmModel, copied, count_of, initialise_as_torch
from poa.backbones.plain import PlainResNet
from poa.backbones.pyramid import Pyramid, PyramidConfig
from poa.multicrop import StochasticDepth
from poa.options import option
from poa.subnets import SearchSpace, Subnet
from poa.weights import load_strictly

EXPANSION = 4  # channels of a block's output over those of its narrowest middle
STEM_STRIDE = 4


@dataclass(frozen=True)
class ResNetConfig(PyramidConfig):
    """Shape of an elastic ResNet, and its search space.

    Example:
        >>> from poa import ResNetConfig
        >>> space = ResNetConfig(max_depths=(3, 8, 36, 3)).space
        >>> len(space), str(space.smallest), str(space.intact)
        (465, '64x3-4-6-3', '128x3-8-36-3')
    """

    marker: ClassVar[str] = "layer1.0.conv2.weight"
    unit_option: ClassVar[str] = "norm_groups"
    sortable: ClassVar[bool] = True
    kind: Literal["resnet"] = option("resnet", "ResNet of bottlenecks with group norm")
    min_depths: tuple[int, ...] = option((3, 4, 6, 3), "blocks per stage of the smallest subnet", "[1, 1024]")
    max_depths: tuple[int, ...] = option((3, 8, 36, 3), "blocks per stage of the intact network", "[1, 1024]")
    base_width: int = option(64, "channels of the stem, a quarter of those of the first stage", "[1, 4096]")
    min_width: int = option(64, "middle channels of the first stage of the narrowest subnet", "[1, 4096]")
    max_width: int = option(128, "middle channels of the first stage of the intact network", "[1, 4096]")
    norm_groups: int = option(32, "groups of every group norm, whatever the width", "[1, 4096]")
    block_order: tuple[int, ...] = option(
        (), "blocks by importance, stage after stage, block 0 first; empty: evenly spaced ones", "[0, 1024)"
    )

    def check(self) -> None:
        super().check()
        if self.block_order:
            orders = [self._order_of(stage) for stage in range(len(self.max_depths))]
            whole = all(
                order[:1] == (0,) and sorted(order) == list(range(depth))
                for order, depth in zip(orders, self.max_depths, strict=True)
            )
            if not whole or len(self.block_order) != sum(self.max_depths):
                raise self.wrong(
                    "block_order", f"all blocks of stages of {self.max_depths}, of each 0 as the first"
                )
        if self.base_width % self.norm_groups:
            raise self.wrong("base_width", f"a multiple of norm_groups {self.norm_groups}")

    @property
    def first_stride(self) -> int:
        return STEM_STRIDE

    @property
    def space(self) -> SearchSpace:
        """All subnets; every width is drawn as often (official)."""
        return dataclasses.replace(super().space, width_scale=1.0)

    def _order_of(self, stage: int) -> tuple[int, ...]:
        """The part of `block_order` that tells of a stage."""
        start = sum(self.max_depths[:stage])
        return self.block_order[start : start + self.max_depths[stage]]

    def active(self, subnet: Subnet, stage: int) -> list[int]:
        return sorted(self._order_of(stage)[: subnet.blocks[stage]]) or super().active(subnet, stage)

    def of_one_size(self, subnet: Subnet, image_size: int | None = None) -> ResNetConfig:
        unordered = dataclasses.replace(self, block_order=())
        return PyramidConfig.of_one_size(unordered, subnet, image_size)

    def feature_width(self, subnet: Subnet) -> int:
        return self.outputs(len(self.max_depths) - 1)

    def outputs(self, stage: int) -> int:
        """Channels of the outputs of a stage's blocks."""
        return EXPANSION * self.base_width * 2**stage

    def parameters(self, subnet: Subnet) -> int:
        total = self.base_width * (self.channels * 7**2 + 2)
        for stage, depth in enumerate(subnet.blocks):
            entry = self.outputs(stage - 1) if stage else self.base_width
            middle, out = subnet.width * 2**stage, self.outputs(stage)
            norms = 4 * middle + 2 * out
            total += depth * (middle * out + 9 * middle**2 + norms) + middle * entry
            total += (depth - 1) * out * middle + entry * out + 2 * out
        return total

    def embedding_flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        side = -(-(image_size or self.image_size) // 2)
        return 2 * side**2 * self.channels * 7**2 * self.base_width

    def flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        total, sides = self.embedding_flops(subnet, image_size), self.sides(image_size)
        for stage, depth in enumerate(subnet.blocks):
            before = sides[max(stage - 1, 0)]
            entry = self.outputs(stage - 1) if stage else self.base_width
            middle, out, area = subnet.width * 2**stage, self.outputs(stage), sides[stage] ** 2
            total += 2 * depth * area * (9 * middle**2 + middle * out)
            total += 2 * (before**2 * entry * middle + (depth - 1) * area * out * middle + area * entry * out)
        return total

    def build(self, generator: torch.Generator | None = None) -> ElasticResNet:
        return ElasticResNet(self, generator)

    def timm_model(self) -> TimmModel | None:
        """As `BackboneConfig.timm_model`; there the stem has 64 channels, stages are four and groups 32."""
        if (self.base_width, len(self.max_depths), self.norm_groups) != (64, 4, 32):
            return None
        arguments = {
            "in_chans": self.channels,
            "layers": list(self.max_depths),
            "base_width": self.max_width,
            "norm_layer": "groupnorm",
        }
        return TimmModel("resnet50", arguments, "conv1", "fc", fixed_input_size=False)

    def plain(self) -> PlainResNet:
        sizes = self.channels, self.base_width, self.max_width, self.max_depths, self.norm_groups
        return PlainResNet(*sizes, expansion=EXPANSION, scale=self.mask_scale)

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], head_dim: int, norm_groups: int) -> ResNetConfig:
        depths = tuple(count_of(state, f"layer{stage}.") for stage in range(1, 5))
        (base, channels), width = state["conv1.weight"].shape[:2], state["layer1.0.conv2.weight"].shape[0]
        return cls(
            channels=channels,
            min_depths=(1,) * 4,
            max_depths=depths,
            base_width=base,
            min_width=norm_groups,
            max_width=width,
            norm_groups=norm_groups,
            masked="mask_token" in state,
        )


class ElasticResNet(Pyramid):
    """An elastic ResNet.

    Crop groups run one after the other: to share launches, maps of several sizes would have to be copied
    around every 3x3 convolution.

    Args:
        config: shape and search space.
        generator: CPU generator of the initial weights; default torch's own.

    Example:
        >>> import torch
        >>> from poa import ElasticResNet, ResNetConfig, Subnet
        >>> resnet = ElasticResNet(ResNetConfig(min_depths=(1, 1), max_depths=(1, 2)))
        >>> (features,) = resnet([torch.randn(2, 3, 64, 64)], Subnet(64, (1, 1)))
        >>> features.cls.shape
        torch.Size([2, 512])
    """

    config: ResNetConfig

    def __init__(self, config: ResNetConfig, generator: torch.Generator | None = None):
        super().__init__(config)
        width, groups = config.base_width, config.norm_groups
        self.conv1 = nn.Conv2d(config.channels, width, 7, stride=2, padding=3, bias=False)
        self.norm1 = ElasticGroupNorm(groups, width)
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if config.masked else None
        entry = width
        for stage, depth in enumerate(config.max_depths):
            out, middle = config.outputs(stage), config.max_width * 2**stage
            blocks = [
                ElasticBottleneck(
                    out if index else entry, middle, out, groups,
                    stride=1 if index or not stage else 2, shortcut=not index,
                )
                for index in range(depth)
            ]  # fmt: skip
            self.add_module(f"layer{stage + 1}", nn.ModuleList(blocks))
            entry = out
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                initialise_as_torch(module, generator)

    def maps(self, inputs: Inputs) -> list[Tensor]:
        assert inputs.drop is None, "a ResNet has no stochastic depth"
        maps = []
        for images, mask in zip(inputs.crops, inputs.masks, strict=True):
            x = self._stem(images, mask)
            for stage, blocks in enumerate(self.active_stages(inputs.subnet)):
                middle = inputs.subnet.width * 2**stage
                for block in blocks:
                    x = recomputed(block, x, middle) if inputs.recompute else block(x, middle)
            maps.append(x)
        return maps

    def _stem(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Images `[B, C, H, W]` to maps `[B, H / 4, W / 4, base_width]`."""
        x = conv_channels_last(images.permute(0, 2, 3, 1), self.conv1.weight, stride=2, padding=3)
        x = self.norm1(x, activation="relu")
        x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, stride=2, padding=1).permute(0, 2, 3, 1)
        return self._under_mask(x, mask)

    def active_stages(self, subnet: Subnet) -> Iterator[list[ElasticBottleneck]]:
        """The blocks of each stage that a subnet runs through, in order."""
        for stage in range(len(self.config.max_depths)):
            blocks = cast(nn.ModuleList, getattr(self, f"layer{stage + 1}"))
            yield [cast(ElasticBottleneck, blocks[index]) for index in self.config.active(subnet, stage)]

    def last_blocks(self, images: Tensor, subnet: Subnet, count: int) -> list[Features]:
        x, outputs = self._stem(images, None), []
        for stage, blocks in enumerate(self.active_stages(self.space.require(subnet))):
            outputs = [x := block(x, subnet.width * 2**stage) for block in blocks]
        return [self._features_of(output) for output in outputs[-count:]]

    def stage_maps(self, images: Tensor, subnet: Subnet, window: int = 0) -> list[Tensor]:
        x, ends = self._stem(images, None), []
        for stage, blocks in enumerate(self.active_stages(self.space.require(subnet))):
            for block in blocks:
                x = block(x, subnet.width * 2**stage)
            ends.append(x)
        return ends

    def draw_stochastic_depth(
        self, crops: Sequence[Tensor], subnet: Subnet, generator: torch.Generator
    ) -> StochasticDepth | None:
        """None: the method has no stochastic depth for ResNets."""
        return None

    def layers_above(self, name: str) -> int:
        depths, (part, *rest) = self.config.max_depths, name.split(".")
        if not part.startswith("layer"):
            return sum(depths)
        stage = int(part.removeprefix("layer")) - 1
        return sum(depths) - (sum(depths[:stage]) + int(rest[0]) + 1)

    @torch.no_grad()
    def to_static(self, subnet: Subnet, image_size: int | None = None) -> ElasticResNet:
        network = ElasticResNet(self.config.of_one_size(self.space.require(subnet), image_size)).eval()
        stem = ("conv1.", "norm1.")
        state = {name: value for name, value in self.state_dict().items() if name.startswith(stem)}
        for stage, blocks in enumerate(self.active_stages(subnet)):
            for index, block in enumerate(blocks):
                parts = block.static_state(subnet.width * 2**stage)
                state |= {f"layer{stage + 1}.{index}.{name}": tensor for name, tensor in parts.items()}
        load_strictly(network, copied(state), "static")
        return network

    def exported_state(self) -> dict[str, Tensor]:
        """As `Backbone.exported_state`; 1x1 convolutions have four dimensions there."""
        return {
            name.replace("norm", "bn"): tensor[..., None, None] if tensor.dim() == 2 else tensor
            for name, tensor in self.state_dict().items()
        }
