"""What every backbone declares, so that the rest trains, measures and exports it without knowing its kind.

The width travels with the data: a backbone makes tokens of the subnet's width and every layer reads it from
its input. No module remembers a subnet, so several subnets can share one graph.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from poa.errors import InputError
from poa.multicrop import StochasticDepth
from poa.options import Options
from poa.subnets import SearchSpace, Subnet

MOST_SUBNETS = 100_000

C = TypeVar("C", bound="BackboneConfig")


@dataclass(frozen=True)
class Features:
    """What a backbone says of one crop group.

    Attributes:
        cls: `[crops, w]`, one token for the image: the class token or the mean of the last map.
        patches: `[crops, patches, w]`, one token for each patch that can be masked.
        tokens: `[crops, tokens, w]` before the last norm.
    """

    cls: Tensor
    patches: Tensor
    tokens: Tensor


class Inputs(NamedTuple):
    """The arguments of `Backbone.forward`, with their defaults filled in."""

    crops: Sequence[Tensor]
    subnet: Subnet
    masks: Sequence[Tensor | None]
    drop: StochasticDepth | None
    recompute: bool


class BackboneConfig(Options, ABC, at="method.backbone"):
    """Shape and search space of a backbone; subclasses are frozen dataclasses of options.

    Attributes:
        kind: its name in configurations and files.
        image_size: pixels of a side of the global crops.
        marker: name of a parameter that weights of this kind alone have.
        channels: of the images.
        unit_option: name of the option of which every width is a multiple.
        sortable: whether trained weights can be sorted by importance; then `block_order` is an option.
    """

    kind: str
    image_size: int
    channels: int
    min_width: int
    max_width: int
    width_step: int | None
    marker: ClassVar[str]
    unit_option: ClassVar[str]
    sortable: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of_weights(cls, state: Mapping[str, Tensor], head_dim: int, norm_groups: int) -> BackboneConfig:
        """That of the network with these parameters; its search space is every width and depth up to it.

        Channels of a ViT's attention head and groups of a ResNet's norms are not in the shapes. Raises
        KeyError: a parameter is missing.
        """

    def require_order(self, low: str, high: str) -> None:
        """Raise InputError where the option `low` is above the option `high`."""
        if getattr(self, low) > getattr(self, high):
            raise self.wrong(low, f"at most {high} {getattr(self, high)}")

    def require_widths(self, depths: int) -> None:
        """Raise InputError where widths do not fit each other, or where there are too many subnets."""
        for name in ("min_width", "max_width", "width_step"):
            if (getattr(self, name) or self.unit) % self.unit:
                raise self.wrong(name, f"a multiple of {self.unit_option} {self.unit}")
        self.require_order("min_width", "max_width")
        if (self.max_width - self.min_width) % self.step:
            raise self.wrong("width_step", f"whole steps from {self.min_width} to {self.max_width}")
        if len(self.widths) * depths > MOST_SUBNETS:
            got = f"{len(self.widths):,} widths of {depths:,} depths"
            raise InputError(f"{self.at}: expected at most {MOST_SUBNETS:,} subnets, got {got}")

    @property
    def unit(self) -> int:
        """Of which every width is a multiple."""
        value: int = getattr(self, self.unit_option)
        return value

    @property
    def step(self) -> int:
        """Distance between widths."""
        return self.width_step or self.unit

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of all subnets."""
        return tuple(range(self.min_width, self.max_width + 1, self.step))

    @property
    @abstractmethod
    def space(self) -> SearchSpace:
        """All subnets."""

    def halved(self: C) -> C:
        """The same network with subnets down to half of its width and depth."""
        narrowest = -(-self.max_width // self.unit // 2) * self.unit
        return self.changed(min_width=narrowest, **self._half_depth())

    def changed(self: C, **options: Any) -> C:
        """The same with other values of some options."""
        return cast(C, dataclasses.replace(cast(Any, self), **options))

    @abstractmethod
    def _half_depth(self) -> dict[str, Any]:
        """Options of subnets down to half of the depth."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels of which the sides of images are multiples."""

    @abstractmethod
    def feature_width(self, subnet: Subnet) -> int:
        """Channels of the features of a subnet."""

    @abstractmethod
    def grid(self, image_size: int) -> int:
        """Maskable patches along a side of a square image. Raises InputError: none of this size."""

    def active_drop_rates(self, subnet: Subnet) -> list[float]:
        """Stochastic-depth rate of each active block; none where the method has no stochastic depth."""
        return []

    def mean_drop_rate(self, subnet: Subnet) -> float:
        """Stochastic-depth rate, averaged over the active blocks."""
        rates = self.active_drop_rates(subnet)
        return sum(rates) / max(len(rates), 1)

    @abstractmethod
    def parameters(self, subnet: Subnet) -> int:
        """Parameters of a subnet as exported."""

    @abstractmethod
    def embedding_flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        """Those of `flops` in the first layer, whose input needs no gradient."""

    @abstractmethod
    def flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        """FLOPs of one image's forward: 2 per multiply-add of every matrix product and convolution."""

    @abstractmethod
    def build(self, generator: torch.Generator | None = None) -> Backbone:
        """The network with initial weights; `generator` is a CPU generator, default torch's own."""

    def timm_model(self) -> TimmModel | None:
        """This network (of one size) in timm, or None where timm has no such network."""
        return None

    def plain(self) -> nn.Module:
        """This network (of one size) for what `Backbone.exported_state` gives; called with crop groups."""
        return self.build()


@dataclass(frozen=True)
class TimmModel:
    """A network of timm.

    Attributes:
        architecture, arguments: of `timm.create_model`.
        first_conv, classifier: names of these layers, which take other images and classes.
        fixed_input_size: whether an image has the size that the network was made for.
    """

    architecture: str
    arguments: dict[str, Any]
    first_conv: str
    classifier: str
    fixed_input_size: bool


class Backbone(nn.Module, ABC):
    """The shared weights of all subnets of `space`, of a shape and an initialisation that `config` has."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.space = config.space

    def forward(
        self,
        crops: Sequence[Tensor],
        subnet: Subnet | None = None,
        *,
        masks: Sequence[Tensor | None] | None = None,
        drop: StochasticDepth | None = None,
        recompute: bool = False,
    ) -> list[Features]:
        """Run all crop groups through a subnet.

        Args:
            crops: groups of normalised images `[B_i, C, H_i, W_i]`.
            subnet: default the intact network.
            masks: bool `[B_i, patches_i]` or None for each group; True patches become the mask token.
            drop: of `draw_stochastic_depth` for these crops and this subnet, on their device.
            recompute: keep only the input of each block for backward and compute it again.

        Returns:
            The `Features` of each group.

        Raises:
            InputError: a subnet outside the search space, or a crop of a size that the backbone cannot take.
        """
        return self._features(self._inputs(crops, subnet, masks, drop, recompute))

    def gather_tokens(
        self,
        crops: Sequence[Tensor],
        patches: Tensor,
        subnet: Subnet | None = None,
        *,
        masks: Sequence[Tensor | None] | None = None,
        drop: StochasticDepth | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """What the losses need of `forward`, whose arguments and errors it shares, without the work for the
        rest.

        `patches` are int64 `[chosen]`, distinct positions among the `[crops * patches]` of the last group.

        Returns:
            `[crops + chosen, w]`: the `cls` of all crops in order, then the chosen patches.
        """
        return self._tokens(self._inputs(crops, subnet, masks, drop, recompute), patches)

    def _inputs(
        self,
        crops: Sequence[Tensor],
        subnet: Subnet | None,
        masks: Sequence[Tensor | None] | None,
        drop: StochasticDepth | None,
        recompute: bool,
    ) -> Inputs:
        subnet = self.space.intact if subnet is None else self.space.require(subnet)
        return Inputs(crops, subnet, masks or [None] * len(crops), drop, recompute)

    @abstractmethod
    def _features(self, inputs: Inputs) -> list[Features]:
        """What `forward` returns."""

    @abstractmethod
    def _tokens(self, inputs: Inputs, patches: Tensor) -> Tensor:
        """What `gather_tokens` returns."""

    @abstractmethod
    def last_blocks(self, images: Tensor, subnet: Subnet, count: int) -> list[Features]:
        """The `Features` of images `[B, C, H, W]` after each of the last `count` blocks of the last stage."""

    @abstractmethod
    def stage_maps(self, images: Tensor, subnet: Subnet, window: int = 0) -> list[Tensor]:
        """The map `[B, height, width, channels]` of images `[B, C, H, W]` at the end of each stage, the
        finest first, the last one after the last norm; of a network without stages its only one.

        Where the map of a ViT has more than `window` patches along a side, most blocks attend in windows of
        at most as many; see `poa.backbones.windows`. 0: in all of the map.
        """

    @abstractmethod
    def draw_stochastic_depth(
        self, crops: Sequence[Tensor], subnet: Subnet, generator: torch.Generator
    ) -> StochasticDepth | None:
        """Choose, with a CPU generator, what each half of each active block works on; None: on all."""

    @abstractmethod
    def layers_above(self, name: str) -> int:
        """Layers of the intact network from a parameter to the end, for layer-wise learning-rate decay."""

    @abstractmethod
    def to_static(self, subnet: Subnet, image_size: int | None = None) -> Backbone:
        """A subnet as a network of its own, offset scales folded into its weights; float32, on the CPU."""

    def exported_state(self) -> dict[str, Tensor]:
        """The weights of a static network as files hold them, under timm's names where timm has it."""
        return self.state_dict()


@torch.no_grad()
def initialise_as_torch(layer: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    """PyTorch's own initialisation of a layer, from a generator."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32, contiguous, on the CPU, in memory of their own."""
    return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}


def count_of(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number that follows a prefix in the names of parameters."""
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


def ratio(hidden: int, width: int) -> float:
    """Of which `int(width * ratio)` is as many hidden units again."""
    share = hidden / width
    return share if int(width * share) == hidden else math.nextafter(share, math.inf)
