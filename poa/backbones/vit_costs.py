"""What a subnet of a ViT costs: its parameters, and the FLOPs of a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_kernels import elastic_hidden_features
from poa.subnets import Subnet

if TYPE_CHECKING:
    from poa.backbones.vit import ViTConfig


def parameters(config: ViTConfig, subnet: Subnet) -> int:
    (depth,), w = subnet.blocks, subnet.width
    hidden = elastic_hidden_features(w, config.max_width, config.hidden)
    attention = 4 * w * w + (4 if config.qkv_bias else 1) * w
    mlp = config.first_layers * (w + 1) * hidden + (hidden + 1) * w
    block = attention + mlp + 6 * w  # with norms and LayerScale
    tokens = config.grid(config.image_size) ** 2 + config.prefix if config.learned else 0
    patch = config.channels * config.patch_size**2
    return depth * block + w * (patch + 1) + w * (config.prefix + tokens) + 2 * w


def embedding_flops(config: ViTConfig, subnet: Subnet, image_size: int | None = None) -> int:
    patches = config.grid(image_size or config.image_size) ** 2
    return 2 * patches * config.channels * config.patch_size**2 * subnet.width


def flops(config: ViTConfig, subnet: Subnet, image_size: int | None = None) -> int:
    (depth,), w = subnet.blocks, subnet.width
    tokens = config.grid(image_size or config.image_size) ** 2 + config.prefix
    hidden = elastic_hidden_features(w, config.max_width, config.hidden)
    linears = 2 * tokens * (4 * w * w + (config.first_layers + 1) * w * hidden)
    attention = 4 * tokens * tokens * w
    return depth * (linears + attention) + embedding_flops(config, subnet, image_size)
