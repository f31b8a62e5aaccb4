"""Elastic vision transformer: one set of weights, any (width, depth) inside it.

Parameter names are timm's. Source: POA (Zhang et al., ECCV 2024); official `DinoVisionTransformer`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from elastic_kernels import (
    ElasticBlock,
    ElasticLayerNorm,
    ElasticPatchEmbed,
    EmbeddingWeights,
    KeptRows,
    Rotary,
    elastic_embedding,
    elastic_hidden_features,
    recomputed,
)
from poa.backbones import vit_costs, vit_formats
from poa.backbones.base import (
    Backbone,
    BackboneConfig,
    Features,
    Inputs,
    copied,
    initialise_as_torch,
    ratio,
)
from poa.backbones.plain import PlainViT
from poa.backbones.positions import RotaryKind, resizing_of_grid, rotary_of_grids
from poa.backbones.windows import MapWindows
from poa.block_graphs import current_graphs
from poa.errors import InputError
from poa.multicrop import Groups, StochasticDepth, class_tokens, draw_stochastic_depth, unpack
from poa.options import option
from poa.subnets import SearchSpace, Subnet, active_blocks
from poa.weights import load_strictly


@dataclass(frozen=True)
class ViTConfig(BackboneConfig):
    """Shape and initialisation of an elastic ViT, and its search space.

    Example:
        >>> from poa import ViTConfig
        >>> space = ViTConfig(max_width=1024, max_depth=24).space
        >>> len(space), str(space.smallest), str(space.intact)
        (143, '384x12', '1024x24')
    """

    marker: ClassVar[str] = "cls_token"
    unit_option: ClassVar[str] = "head_dim"
    sortable: ClassVar[bool] = True
    kind: Literal["vit"] = option("vit", "vision transformer")
    image_size: int = option(224, "pixels of a side of the global crops; sets the position grid", "[1, 4096]")
    channels: int = option(3, "channels of the images", "[1, 16]")
    patch_size: int = option(16, "pixels of a side of a patch", "[1, 1024]")
    min_width: int = option(384, "channels of the narrowest subnet", "[1, 16384]")
    max_width: int = option(1024, "channels of the intact network", "[1, 16384]")
    width_step: int | None = option(None, "distance between widths; none: head_dim", "[1, 16384]")
    min_depth: int = option(12, "blocks of the shallowest subnet", "[1, 1024]")
    max_depth: int = option(24, "blocks of the intact network", "[1, 1024]")
    depth_step: int = option(1, "distance between depths", "[1, 1024]")
    block_order: tuple[int, ...] = option(
        (), "blocks by importance: a subnet keeps the first; empty: evenly spaced ones", "[0, 1024)"
    )
    head_dim: int = option(64, "channels of an attention head", "[1, 1024]")
    positions: Literal["learned", "rotary", "axial", "learned-axial"] = option(
        "learned", "position embedding: learned, rotary as of DINOv3, axial as of EVA, or learned and axial"
    )
    axial_temperature: float = option(10000.0, "temperature of the axial embedding", "(0, 1e9]")
    axial_grid: int = option(
        0, "patches along a side that the axial embedding scales to; 0: not scaled", "[0, 1024]"
    )
    qkv_bias: bool = option(True, "queries, keys and values have a bias")
    norm_eps: float = option(1e-6, "added to the variance in norms", "(0, 1]")
    registers: int = option(0, "register tokens, which attend and are no output", "[0, 64]")
    mlp: Literal["gelu", "swiglu"] = option("gelu", "MLP of a block: with a GELU, or gated by a SiLU")
    mlp_ratio: float = option(4.0, "hidden units of the MLP over the width", "(0, 64]")
    layer_scale: float = option(1e-5, "initial LayerScale", "[0, 100]")
    drop_path: float = option(0.2, "stochastic-depth rate of the students", "[0, 1)")
    drop_path_uniform: bool = option(True, "one stochastic-depth rate for all blocks; false: rising from 0")
    sampling_scale: float = option(
        3.0, "how much more often the smallest width, or depth, is drawn than the largest", "[1, 100]"
    )
    masked: bool = option(True, "has a mask token; false for exported models")

    def check(self) -> None:
        self.require_order("min_depth", "max_depth")
        self.require_widths(1 + (self.max_depth - self.min_depth) // self.depth_step)
        if (self.max_depth - self.min_depth) % self.depth_step:
            raise self.wrong("depth_step", f"whole steps from {self.min_depth} to {self.max_depth}")
        if self.block_order and sorted(self.block_order) != list(range(self.max_depth)):
            raise self.wrong("block_order", f"each of 0..{self.max_depth - 1} once")
        if int(self.mlp_ratio * self.min_width) < 1:
            raise self.wrong("mlp_ratio", f"at least one hidden unit at min_width {self.min_width}")
        if self.rotary and self.head_dim % 4:
            raise self.wrong("head_dim", f"a multiple of 4 with positions={self.positions}")
        self.grid(self.image_size)

    @property
    def space(self) -> SearchSpace:
        return SearchSpace(
            widths=self.widths,
            depths=tuple(range(self.min_depth, self.max_depth + 1, self.depth_step)),
            width_scale=self.sampling_scale,
            depth_scale=self.sampling_scale,
        )

    @property
    def stride(self) -> int:
        return self.patch_size

    def _half_depth(self) -> dict[str, Any]:
        return {"min_depth": -(-self.max_depth // 2)}

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 + self.registers

    @property
    def learned(self) -> bool:
        """Whether there is a position embedding."""
        return self.positions.startswith("learned")

    @property
    def rotary(self) -> RotaryKind | None:
        """Which angles turn queries and keys."""
        if self.positions.endswith("axial"):
            return RotaryKind(self.axial_temperature, centred=False, grid=self.axial_grid)
        return RotaryKind() if self.positions == "rotary" else None

    @property
    def hidden(self) -> int:
        """Hidden units of the intact MLP."""
        return int(self.max_width * self.mlp_ratio)

    @property
    def first_layers(self) -> int:
        """Layers before the hidden units of an MLP: with a gate two."""
        return 2 if self.mlp == "swiglu" else 1

    @property
    def drop_rates(self) -> list[float]:
        """Stochastic-depth rate of each of the `max_depth` blocks."""
        if self.drop_path_uniform:
            return [self.drop_path] * self.max_depth
        return [float(r) for r in torch.linspace(0, self.drop_path, self.max_depth)]

    def feature_width(self, subnet: Subnet) -> int:
        return subnet.width

    def active(self, subnet: Subnet) -> list[int]:
        """Indices of the active blocks."""
        (depth,) = subnet.blocks
        return sorted(self.block_order[:depth]) or active_blocks(self.max_depth, depth)

    def active_drop_rates(self, subnet: Subnet) -> list[float]:
        """Stochastic-depth rate of each active block; not rescaled for shallow subnets (official)."""
        return [self.drop_rates[i] for i in self.active(subnet)]

    def grid(self, image_size: int) -> int:
        if image_size < self.patch_size or image_size % self.patch_size:
            raise InputError(
                f"image size: expected a multiple of the patch size {self.patch_size}, got {image_size}"
            )
        return image_size // self.patch_size

    parameters = vit_costs.parameters
    embedding_flops = vit_costs.embedding_flops
    flops = vit_costs.flops
    timm_model = vit_formats.timm_model

    def build(self, generator: torch.Generator | None = None) -> ElasticViT:
        return ElasticViT(self, generator)

    def of_one_size(self, subnet: Subnet, image_size: int | None = None) -> ViTConfig:
        """The configuration of a subnet as a network of its own."""
        (depth,) = subnet.blocks
        hidden = elastic_hidden_features(subnet.width, self.max_width, self.hidden)
        return dataclasses.replace(
            self,
            image_size=image_size or self.image_size,
            min_width=subnet.width,
            max_width=subnet.width,
            min_depth=depth,
            max_depth=depth,
            block_order=(),
            mlp_ratio=ratio(hidden, subnet.width),
            drop_path=0.0,
            masked=False,
        )

    def plain(self) -> PlainViT:
        return PlainViT(self)

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], head_dim: int, norm_groups: int) -> ViTConfig:
        return cls(min_width=head_dim, min_depth=1, head_dim=head_dim, **vit_formats.sizes_of(state))


class ElasticViT(Backbone):
    """An elastic ViT.

    Args:
        config: shape, initialisation and search space.
        generator: CPU generator of the initial weights; default torch's own.

    Example:
        >>> import torch
        >>> from poa import ElasticViT, Subnet, ViTConfig
        >>> vit = ElasticViT(ViTConfig(image_size=32, min_width=64, max_width=128, min_depth=2, max_depth=4))
        >>> (features,) = vit([torch.randn(2, 3, 32, 32)], Subnet(64, 3))
        >>> features.cls.shape, features.patches.shape
        (torch.Size([2, 64]), torch.Size([2, 4, 64]))
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig, generator: torch.Generator | None = None):
        super().__init__(config)
        width, patches = config.max_width, config.grid(config.image_size) ** 2
        self.patch_embed = ElasticPatchEmbed(config.patch_size, width, config.channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        positions = torch.zeros(1, config.prefix + patches, width)
        if config.learned:
            self.pos_embed: Tensor = nn.Parameter(positions)
        else:
            self.register_buffer("pos_embed", positions, persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if config.masked else None
        self.blocks = nn.ModuleList(
            ElasticBlock(
                width,
                config.hidden,
                config.head_dim,
                eps=config.norm_eps,
                layer_scale=config.layer_scale,
                qkv_bias=config.qkv_bias,
                gate=config.mlp == "swiglu",
            )
            for _ in range(config.max_depth)
        )
        self.norm = ElasticLayerNorm(width, eps=config.norm_eps)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        """Official: linears and positions truncated normal 0.02, class token 1e-6, the rest torch's own."""
        initialise_as_torch(self.patch_embed.proj, generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6, generator=generator)
        if self.config.learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _features(self, inputs: Inputs) -> list[Features]:
        """All groups are one packed token tensor."""
        return self._features_of(*self._run(inputs))

    def _tokens(self, inputs: Inputs, patches: Tensor) -> Tensor:
        """The last block makes no other tokens."""
        crops = inputs.crops
        cls = class_tokens(self.groups(crops), patches.device)
        last = math.prod(self._grid(crops[-1]))
        # Every image of the last group has its class token and registers before its patches.
        start = sum(crops * length for crops, length in self.groups(crops[:-1]))
        tokens = torch.cat([*cls, patches + (patches // last + 1) * self.config.prefix + start])
        x, _ = self._run(inputs, only=tokens)
        return self.normalise(x)

    def _run(self, inputs: Inputs, only: Tensor | None = None) -> tuple[Tensor, Groups]:
        """Packed tokens before the last norm, all or `only` some of them."""
        subnet, drop = inputs.subnet, inputs.drop
        x, groups = self.embed(inputs.crops, subnet.width, inputs.masks)
        blocks, rotary = self.active_blocks(subnet), self._rotary(inputs.crops)
        halves: Sequence[tuple[KeptRows, KeptRows] | None] = drop.blocks if drop else [None] * len(blocks)
        if only is not None and len(blocks) > 1 and (graphs := current_graphs()):
            x = graphs(blocks[:-1], x, groups, halves[:-1], rotary)
            blocks, halves = blocks[-1:], halves[-1:]
        for block, kept in zip(blocks, halves, strict=True):
            wanted = only if block is blocks[-1] else None
            if inputs.recompute:
                x = recomputed(block, x, groups, kept, only=wanted, rotary=rotary)
            else:
                x = block(x, groups, kept, only=wanted, inplace=True, rotary=rotary)
        return x, groups

    def last_blocks(self, images: Tensor, subnet: Subnet, count: int) -> list[Features]:
        x, groups = self.embed([images], self.space.require(subnet).width)
        rotary = self._rotary([images])
        outputs = [x := block(x, groups, None, rotary=rotary) for block in self.active_blocks(subnet)]
        return [self._features_of(output, groups)[0] for output in outputs[-count:]]

    def stage_maps(self, images: Tensor, subnet: Subnet, window: int = 0) -> list[Tensor]:
        grid = self._grid(images)
        if not 0 < window < max(grid):
            return [self([images], subnet)[0].patches.unflatten(1, grid)]
        x, groups = self.embed([images], self.space.require(subnet).width)
        windows = MapWindows.of(len(images), grid, self.config.prefix, window, images.device)
        x = windows.run(self.active_blocks(subnet), x, groups, self._rotary([images]))
        return [self._features_of(x, groups)[0].patches.unflatten(1, grid)]

    def _features_of(self, x: Tensor, groups: Groups) -> list[Features]:
        tokens, normed = unpack(x, groups), unpack(self.normalise(x), groups)
        prefix = self.config.prefix
        return [Features(n[:, 0], n[:, prefix:], t) for t, n in zip(tokens, normed, strict=True)]

    def embed(
        self, crops: Sequence[Tensor], width: int, masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, Groups]:
        """Packed tokens `[tokens, width]` of all crops: class token, registers and patches of each."""
        conv = self.patch_embed.proj
        assert conv.bias is not None
        tokens = self.cls_token, self.reg_token, self.pos_embed, self.mask_token
        weights = EmbeddingWeights(conv.weight, conv.bias, *tokens)
        resizings = [resizing_of_grid(self.pos_embed, weights.prefix, *self._grid(c)) for c in crops]
        return elastic_embedding(crops, weights, width, masks=masks, resizings=resizings), self.groups(crops)

    def normalise(self, x: Tensor) -> Tensor:
        """The last LayerNorm, over the width of `x`."""
        return self.norm(x)

    def mean_pool(self, features: Features) -> Tensor:
        """`[crops, w]`: the norm of the mean patch token (not the mean of the normed tokens)."""
        return self.normalise(features.tokens[:, self.config.prefix :].mean(1))

    def active_blocks(self, subnet: Subnet) -> list[ElasticBlock]:
        """The blocks a subnet runs through, in order."""
        return [cast(ElasticBlock, self.blocks[i]) for i in self.config.active(subnet)]

    def draw_stochastic_depth(
        self, crops: Sequence[Tensor], subnet: Subnet, generator: torch.Generator
    ) -> StochasticDepth | None:
        rates = self.config.active_drop_rates(subnet)
        return draw_stochastic_depth(self.groups(crops), rates, generator, crops[0].device)

    def layers_above(self, name: str) -> int:
        top = self.config.max_depth + 1
        if name.startswith("blocks."):
            return top - (int(name.split(".")[1]) + 1)
        return 0 if name.startswith("norm.") else top

    @torch.no_grad()
    def to_static(self, subnet: Subnet, image_size: int | None = None) -> ElasticViT:
        """As `Backbone.to_static`; the position embedding is interpolated to the image size."""
        config = self.config.of_one_size(self.space.require(subnet), image_size)
        state = vit_formats.static_state(self, subnet, config.grid(config.image_size))
        network = ElasticViT(config).eval()
        load_strictly(network, copied(state), "static")
        return network

    def exported_state(self) -> dict[str, Tensor]:
        return vit_formats.exported_state(self.config, self.state_dict())

    def groups(self, crops: Sequence[Tensor]) -> Groups:
        """How `forward` packs crops: the number of each group and the tokens of one."""
        return tuple((len(c), self.config.prefix + math.prod(self._grid(c))) for c in crops)

    def _rotary(self, crops: Sequence[Tensor]) -> Rotary | None:
        """Angles of all tokens of packed crops, if the embedding is rotary."""
        config, grids = self.config, [(len(c), *self._grid(c)) for c in crops]
        if config.rotary is None:
            return None
        return rotary_of_grids(self.cls_token, grids, config.prefix, config.head_dim, config.rotary)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        patch = self.config.patch_size
        height, breadth = images.shape[-2:]
        if height % patch or breadth % patch:
            raise InputError(f"crop: expected sides divisible by patch size {patch}, got {height}x{breadth}")
        return height // patch, breadth // patch
