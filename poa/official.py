"""Weights of the official POA implementation as networks of this project.

Official names differ in three ways: elastic layers wrap theirs (`qkv.linear.weight`, `norm1.norm.weight`),
heads are `dino_head.mlp0.2` and `dino_head.last_layer0`, and training checkpoints add `backbone.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from poa.backbones import CONFIGS, Backbone, BackboneConfig
from poa.errors import InputError, as_input
from poa.weights import load_strictly, read_weights

UNUSED = re.compile(r"norm[012]\.norm\.|.*relative_position_index$")
"""Norms of Swin's first stages, which take no part in training, and a table that follows from the window."""


def backbone_name(official: str) -> str:
    """The name here of an official backbone parameter (without `backbone.`)."""
    name = official.replace(".w_msa.", ".").replace(".ffn.", ".mlp.").replace(".layers.", ".")
    name = re.sub(r"^norm3\.norm\.", "norm.", re.sub(r"\.(linear|conv)\.(weight|bias)$", r".\2", name))
    return re.sub(r"(norm\d?)\.norm\.", r"\1.", name)


def backbone_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official backbone parameters under the names and in the shapes of this project.

    1x1 convolutions of a ResNet become matrices.
    """
    used = {backbone_name(name): value for name, value in official.items() if not UNUSED.match(name)}
    return {
        name: value.flatten(1) if value.dim() == 4 and value.shape[2:] == (1, 1) else value
        for name, value in used.items()
    }


def head_name(official: str) -> str:
    """The name here of an official head parameter (without `dino_head.`)."""
    if match := re.fullmatch(r"last_layer(\d+)\.(weight_[gv])", official):
        return f"heads.{match[1]}.prototypes.{match[2]}"
    if match := re.fullmatch(r"mlp(\d+)(?:\.(\d+))?(?:\.linear)?\.(weight|bias)", official):
        layer = int(match[2] or 0) // 2  # every second entry of the official Sequential is a GELU
        return f"heads.{match[1]}.{'first' if layer == 0 else f'rest.{layer - 1}'}.{match[3]}"
    raise InputError(f"official head: expected mlpN.* or last_layerN.weight_g/v, got {official!r}")


def network_name(official: str) -> str:
    """The name here of a parameter of an official student or teacher."""
    part, _, local = official.partition(".")
    if part == "backbone":
        return f"backbone.{backbone_name(local)}"
    if part == "dino_head":
        return f"head.{head_name(local)}"
    raise InputError(f"official checkpoint: expected backbone.* or dino_head.*, got {official!r}")


def load_backbone(
    path: str | Path, *, branch: str = "teacher", head_dim: int = 64, norm_groups: int = 32
) -> Backbone:
    """Read the backbone of an official POA checkpoint: ViT, Swin or ResNet.

    Args:
        path: a `.pth` file as the official trainer writes it (`{"teacher": ...}` or `{"model": ...}`), a bare
            state dict, or a safetensors file with official names.
        branch: "teacher" or "student", for files that hold both.
        head_dim: channels of an attention head of a ViT, which shapes do not tell (64 in every official one).
        norm_groups: groups of a ResNet's norms (32 in the official one).

    Returns:
        The intact backbone; its search space is every width and depth up to it.

    Raises:
        InputError: not readable as weights, or keys missing or unknown.

    Example:
        >>> import torch
        >>> from poa import ViTConfig, official
        >>> weights = ViTConfig(image_size=32, min_width=64, max_width=128, max_depth=12).build().state_dict()
        >>> torch.save({"teacher": {f"backbone.{name}": w for name, w in weights.items()}}, "official.pth")
        >>> str(official.load_backbone("official.pth").space.intact)
        '128x12'
    """
    with as_input(f"{path}: expected official weights"):
        state = of_branch(read_weights(Path(path)), branch, str(path))
    return backbone_from_state(state, name=str(path), head_dim=head_dim, norm_groups=norm_groups)


def backbone_from_state(
    state: Mapping[str, Tensor], *, name: str = "state", head_dim: int = 64, norm_groups: int = 32
) -> Backbone:
    """An elastic backbone from official parameters; kind and sizes are read from their names and shapes."""
    with as_input(f"{name}: expected weights of a backbone"):
        backbone = _config(backbone_state(state), name, head_dim, norm_groups).build()
        load_strictly(backbone, backbone_state(state), name)
    return backbone


def _config(converted: Mapping[str, Tensor], name: str, head_dim: int, norm_groups: int) -> BackboneConfig:
    """Kind and sizes of the network that has these parameters."""
    kinds = [kind for kind in CONFIGS if kind.marker in converted]
    if not kinds:
        markers = ", ".join(kind.marker for kind in CONFIGS)
        raise InputError(f"{name}: expected weights of a ViT, Swin or ResNet, got none of {markers}")
    try:
        return kinds[0].of_weights(converted, head_dim, norm_groups)
    except KeyError as missing:
        raise InputError(f"{name}: expected weights of a backbone, got no {missing}") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def of_branch(content: Any, branch: str, name: str) -> dict[str, Tensor]:
    """The parameters of one branch's backbone, `backbone.` stripped."""
    for key in (branch, "model", "state_dict"):
        if isinstance(content, Mapping) and key in content:
            content = content[key]
    if not isinstance(content, Mapping):
        raise InputError(f"{name}: expected a mapping of weights, got {type(content).__name__}")
    prefixes = (f"{branch}.backbone.", "backbone.")
    for prefix in prefixes:
        inside = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
        if inside:
            return inside
    return dict(content)
