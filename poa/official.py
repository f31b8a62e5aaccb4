"""Weights of the official POA implementation as networks of this project.

Official names differ in three ways: elastic layers wrap theirs (`qkv.linear.weight`, `norm1.norm.weight`),
heads are `dino_head.mlp0.2` and `dino_head.last_layer0`, and training checkpoints add `backbone.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from poa.backbones import ElasticViT, ViTConfig
from poa.errors import InputError
from poa.weights import load_strictly, read_weights


def backbone_name(official: str) -> str:
    """The name here of an official ViT backbone parameter (without `backbone.`)."""
    return re.sub(r"(norm\d?)\.norm\.", r"\1.", official.replace(".linear.", "."))


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


def load_vit(path: str | Path, *, head_dim: int = 64, branch: str = "teacher") -> ElasticViT:
    """Read the backbone of an official POA ViT checkpoint.

    Args:
        path: a `.pth` file as the official trainer writes it (`{"teacher": ...}` or `{"model": ...}`), a bare
            state dict, or a safetensors file with official names.
        head_dim: channels of an attention head (64 in every official model).
        branch: "teacher" or "student", for files that hold both.

    Returns:
        The intact backbone; its search space is every width and depth up to it.

    Raises:
        InputError: not readable as weights, or keys missing or unknown.
    """
    state = _backbone_state(_read(Path(path)), branch, str(path))
    return vit_from_state(state, head_dim=head_dim, name=str(path))


def vit_from_state(state: Mapping[str, Tensor], *, head_dim: int, name: str = "state") -> ElasticViT:
    """An elastic ViT from official backbone parameters; sizes are read from their shapes."""
    try:
        width = state["cls_token"].shape[-1]
        patch = state["patch_embed.proj.weight"].shape[-1]
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        hidden = state["blocks.0.mlp.fc1.linear.weight"].shape[0]
    except KeyError as missing:
        raise InputError(f"{name}: expected official ViT weights, got no {missing}") from None
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    config = ViTConfig(
        image_size=side * patch,
        patch_size=patch,
        min_width=head_dim,
        max_width=width,
        min_depth=1,
        max_depth=depth,
        head_dim=head_dim,
        mlp_ratio=hidden / width,
        masked="mask_token" in state,
    )
    vit = ElasticViT(config)
    load_strictly(vit, {backbone_name(key): value for key, value in state.items()}, name)
    return vit


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return read_weights(path)


def _backbone_state(content: Any, branch: str, name: str) -> dict[str, Tensor]:
    """The parameters of one branch's backbone, `backbone.` stripped."""
    for key in (branch, "model"):
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
