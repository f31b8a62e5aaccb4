"""ViTs elsewhere: which network of timm one is, under which names its weights are there, sizes of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from poa.backbones.base import TimmModel, count_of, ratio
from poa.backbones.positions import positions_of_grid
from poa.errors import InputError
from poa.subnets import Subnet

if TYPE_CHECKING:
    from poa.backbones.vit import ElasticViT, ViTConfig

EPS, ROTARY_EPS = 1e-6, 1e-5  # of norms of timm's ViTs, and of those with a rotary embedding
ROTARY_GRID = 14  # patches along a side, where no learned positions tell it


def timm_model(config: ViTConfig) -> TimmModel | None:
    """As `BackboneConfig.timm_model`; timm's ViTs with a rotary embedding have no bias of keys, and EVA's
    turn other pairs of channels."""
    if config.positions not in ("learned", "rotary"):
        return None
    learned, gated = config.positions == "learned", config.mlp == "swiglu"
    if config.norm_eps != (EPS if learned else ROTARY_EPS) or (config.qkv_bias and not learned):
        return None
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "in_chans": config.channels,
        "patch_size": config.patch_size,
        "embed_dim": config.max_width,
        "depth": config.max_depth,
        "num_heads": config.max_width // config.head_dim,
        "mlp_ratio": ratio(config.hidden, config.max_width),
        "init_values": config.layer_scale or 1.0,  # timm leaves a scale of 0 out
    }
    if not learned:
        arguments |= {"num_reg_tokens": config.registers, "global_pool": "token", "swiglu_mlp": gated}
        return TimmModel("vit_small_patch16_dinov3", arguments, "patch_embed.proj", "head", False)
    arguments |= {"reg_tokens": config.registers}
    if gated:  # timm counts the gate, too
        arguments["mlp_ratio"] = ratio(2 * config.hidden, config.max_width)
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    name = "vit_giant_patch14_dinov2" if gated else "vit_base_patch16_224"
    return TimmModel(name, arguments, "patch_embed.proj", "head", fixed_input_size=True)


def exported_state(config: ViTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an `ElasticViT` under timm's names."""
    if config.positions != "rotary":
        return state
    return {re.sub(r"ls(\d)\.gamma$", r"gamma_\1", name): tensor for name, tensor in state.items()}


def static_state(vit: ElasticViT, subnet: Subnet, side: int) -> dict[str, Tensor]:
    """The weights of a subnet as those of a network of its own, for a grid of `side` x `side` patches."""
    width, bias = subnet.width, vit.patch_embed.proj.bias
    assert bias is not None
    state = {
        "cls_token": vit.cls_token[..., :width],
        "patch_embed.proj.weight": vit.patch_embed.proj.weight[:width],
        "patch_embed.proj.bias": bias[:width],
        "norm.weight": vit.norm.weight[:width],
        "norm.bias": vit.norm.bias[:width],
    }
    if vit.config.learned:
        state["pos_embed"] = positions_of_grid(vit.pos_embed[..., :width], vit.config.prefix, side, side)
    if vit.reg_token is not None:
        state["reg_token"] = vit.reg_token[..., :width]
    for position, block in enumerate(vit.active_blocks(subnet)):
        corner = block.static_state(width)
        state |= {f"blocks.{position}.{name}": tensor for name, tensor in corner.items()}
    return state


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the ViT that has these weights, but for its heads.

    Raises:
        KeyError: a parameter is missing.
        InputError: an MLP with more than one gate.
    """
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    hidden, read = state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]
    if hidden not in (read, 2 * read):
        raise InputError(f"expected an MLP with one gate or none, got {hidden} units before {read}")
    side, learned = ROTARY_GRID, "pos_embed" in state
    if learned:
        side = round((state["pos_embed"].shape[1] - 1 - registers) ** 0.5)
    return {
        "image_size": side * patch,
        "channels": state["patch_embed.proj.weight"].shape[1],
        "patch_size": patch,
        "max_width": width,
        "max_depth": count_of(state, "blocks."),
        "positions": "learned" if learned else "rotary",
        "registers": registers,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "norm_eps": EPS if learned else ROTARY_EPS,
        "mlp": "gelu" if hidden == read else "swiglu",
        "mlp_ratio": ratio(read, width),
        "masked": "mask_token" in state,
    }
