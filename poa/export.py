"""Subnets out: ordinary ViTs in safetensors files, and the loader that reads them.

A file holds a static network in timm's `VisionTransformer` naming: the prefix of every weight, the offset
scale folded into it, the kept blocks renumbered, the position embedding of the wanted image size. Beside it
lies a JSON file with the architecture, the pre-processing and where it comes from. Every file is checked
before it gets its name: its forward must equal the elastic subnet's.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elastic_kernels import ElasticBlock, elastic_hidden_features
from poa.backbones import ElasticViT, ViTConfig
from poa.checkpoint import write_json
from poa.config import CropsConfig
from poa.data.loader import place_on_canvases
from poa.data.resample import eval_crop
from poa.errors import InputError
from poa.options import from_dict, to_dict
from poa.subnets import Subnet
from poa.weights import load_strictly

FORMAT = "poa-vit-1"
TOLERANCE = 1e-5  # largest difference of a file's forward from the elastic subnet's, fp32, relative to 1


class ExportedModel(nn.Module):
    """A subnet read from a file: images in, features out.

    Attributes:
        backbone: the network.
        info: what the JSON file says.
    """

    def __init__(self, backbone: ElasticViT, info: dict[str, Any]):
        super().__init__()
        self.backbone = backbone
        self.info = info

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]` -> class-token features `[B, width]`."""
        return self.backbone([images])[0].cls

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> normalised centre crops `[B, 3, S, S]`, as in evaluation."""
        pictures = [images] if isinstance(images, Image.Image) else images
        arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
        canvas, sizes = place_on_canvases(arrays)
        wanted = self.info["preprocessing"]
        crops = eval_crop(
            canvas, sizes, wanted["size"], wanted["mean"], wanted["std"], resize=wanted["resize"]
        )
        return crops.to(self.backbone.cls_token.device)


def load(path: str | Path) -> ExportedModel:
    """Read an extracted subnet.

    Args:
        path: the `.safetensors` file; its `.json` lies beside it.

    Raises:
        InputError: not a pair of files that `poa extract` wrote.
    """
    path = Path(path)
    try:
        info = json.loads(path.with_suffix(".json").read_text())
        state = load_file(path)
    except Exception as error:
        raise InputError(f"{path}: expected an extracted subnet, got: {error}") from None
    if info.get("format") != FORMAT:
        raise InputError(f"{path}: expected format {FORMAT}, got {info.get('format')}")
    backbone = ElasticViT(from_dict(ViTConfig, info["backbone"]))
    load_strictly(backbone, state, str(path))
    return ExportedModel(backbone.eval(), info)


def extract(
    backbone: ElasticViT,
    subnet: Subnet,
    folder: Path,
    crops: CropsConfig,
    *,
    image_size: int | None = None,
    source: str = "",
) -> Path:
    """Write one subnet as a static model.

    Args:
        backbone: the shared weights.
        subnet: which network.
        folder: where `vit-w{width}-d{depth}.safetensors` and `.json` go; made if needed.
        crops: gives the pre-processing.
        image_size: pixels; the position embedding is interpolated to it and baked in. Default: as trained.
        source: where the weights come from, kept in the JSON file.

    Returns:
        The path of the safetensors file.

    Raises:
        InputError: a subnet outside the space, or an image size not divisible by the patch size.
    """
    backbone.space.require(subnet)
    config = static_config(backbone.config, subnet, image_size)
    state = static_state(backbone, subnet, config)
    static = ElasticViT(config).eval()
    load_strictly(static, state, "extract")
    worst = _largest_difference(backbone, static, subnet)
    folder.mkdir(parents=True, exist_ok=True)
    size = config.image_size
    suffix = f"-{size}px" if size != backbone.config.image_size else ""
    path = folder / f"vit-w{subnet.width}-d{subnet.depth}{suffix}.safetensors"
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial, metadata={"format": "pt"})
    info = {
        "format": FORMAT,
        "width": subnet.width,
        "depth": subnet.depth,
        "params": backbone.config.parameters(subnet),
        "backbone": to_dict(config),
        "timm": _timm_arguments(config),
        "preprocessing": {
            "size": size,
            "resize": crops.eval_resize(size),
            "interpolation": "bicubic",
            "mean": list(crops.mean),
            "std": list(crops.std),
        },
        "source": source,
        "sha256": hashlib.sha256(partial.read_bytes()).hexdigest(),
        "largest_difference": worst,
    }
    write_json(path.with_suffix(".json"), info)
    os.replace(partial, path)
    return path


def static_config(config: ViTConfig, subnet: Subnet, image_size: int | None = None) -> ViTConfig:
    """The configuration of a subnet as a network of its own."""
    hidden = elastic_hidden_features(subnet.width, config.max_width, config.hidden)
    return dataclasses.replace(
        config,
        image_size=image_size or config.image_size,
        min_width=subnet.width,
        max_width=subnet.width,
        min_depth=subnet.depth,
        max_depth=subnet.depth,
        mlp_ratio=hidden / subnet.width,
        drop_path=0.0,
        masked=False,
    )


@torch.no_grad()
def static_state(backbone: ElasticViT, subnet: Subnet, config: ViTConfig) -> dict[str, Tensor]:
    """The weights of a subnet under timm's names, offset scales folded in, float32 and contiguous."""
    width, side = subnet.width, config.grid(config.image_size)
    state = {
        "cls_token": backbone.cls_token[..., :width],
        "pos_embed": backbone.position_embedding(side, side, width),
        "patch_embed.proj.weight": backbone.patch_embed.proj.weight[:width],
        "patch_embed.proj.bias": _bias(backbone.patch_embed.proj)[:width],
        "norm.weight": backbone.norm.weight[:width],
        "norm.bias": backbone.norm.bias[:width],
    }
    for position, block in enumerate(backbone.active_blocks(subnet)):
        prefixes = _static_block(block, width, config.hidden)
        state |= {f"blocks.{position}.{name}": tensor for name, tensor in prefixes.items()}
    return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}


def _static_block(block: ElasticBlock, width: int, hidden: int) -> dict[str, Tensor]:
    """Prefixes of one block; `W * in_max / in` for its linears."""
    assert block.ls1 is not None and block.ls2 is not None  # every backbone of ours has LayerScale
    largest = block.ls1.gamma.shape[0]
    qkv, scale = block.attn.qkv, largest / width
    corner = qkv.weight.view(3, largest, largest)[:, :width, :width]
    fc1, fc2, proj = block.mlp.fc1, block.mlp.fc2, block.attn.proj
    state = {
        "attn.qkv.weight": corner.flatten(0, 1) * scale,
        "attn.qkv.bias": _bias(qkv).view(3, largest)[:, :width].flatten(),
        "attn.proj.weight": proj.weight[:width, :width] * scale,
        "attn.proj.bias": _bias(proj)[:width],
        "mlp.fc1.weight": fc1.weight[:hidden, :width] * scale,
        "mlp.fc1.bias": _bias(fc1)[:hidden],
        "mlp.fc2.weight": fc2.weight[:width, :hidden] * (fc2.weight.shape[1] / hidden),
        "mlp.fc2.bias": _bias(fc2)[:width],
        "ls1.gamma": block.ls1.gamma[:width],
        "ls2.gamma": block.ls2.gamma[:width],
    }
    for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
        state |= {f"{name}.weight": norm.weight[:width], f"{name}.bias": norm.bias[:width]}
    return state


@torch.no_grad()
def _largest_difference(elastic: ElasticViT, static: ElasticViT, subnet: Subnet) -> float:
    """Compare both networks on random images of the static one's size; raise where they are not equal."""
    size, device = static.config.image_size, elastic.cls_token.device
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole = elastic if elastic.cls_token.dtype == torch.float32 else copy.deepcopy(elastic).float()
    (a,) = whole([images.to(device)], subnet)
    (b,) = static([images])
    pairs = ((a.cls.cpu(), b.cls), (a.patches.cpu(), b.patches))
    worst = max(float((x - y).abs().max() / max(1.0, float(y.abs().max()))) for x, y in pairs)
    if not worst < TOLERANCE:  # also where it is no number
        raise RuntimeError(
            f"extract: the static model differs from subnet {subnet} by {worst:.2e}, "
            f"expected less than {TOLERANCE:.0e}; nothing was written"
        )
    return worst


def _timm_arguments(config: ViTConfig) -> dict[str, Any]:
    """Keyword arguments of `timm.models.VisionTransformer` for this network."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.max_width,
        "depth": config.max_depth,
        "num_heads": config.max_width // config.head_dim,
        "mlp_ratio": config.mlp_ratio,
        "init_values": config.layer_scale,
        "num_classes": 0,
    }


def _bias(module: nn.Linear | nn.Conv2d) -> Tensor:
    assert module.bias is not None
    return module.bias
