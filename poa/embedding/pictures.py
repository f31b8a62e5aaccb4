"""Pictures of what subnets see: attention of the class token by head, patch tokens as colours; one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones.plain import PlainViT
from poa.data.decode import ImageError
from poa.data.preprocessing import Picture
from poa.embedding.nearest import SIDE, STYLE, figure_of, picture_of
from poa.errors import InputError
from poa.export import ExportedModel
from poa.files import write_text

FAINT, BRIGHT = 0.02, 0.98  # quantiles that become black and white


@torch.no_grad()
def class_attention(model: ExportedModel, images: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block, `[B, heads, patches]`, of normalised
    images.

    Of all tokens, class token and registers included, it sums to 1. Raises InputError: not a vision
    transformer.
    """
    network = model.backbone
    if not isinstance(network, PlainViT):
        raise InputError(f"attention: expected a vision transformer, got a {model.config.kind}")
    attention: Any = network.blocks[-1].attn
    seen = list[tuple[Tensor, ...]]()
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(module.projected(*inputs)))
    try:
        network([images])
    finally:
        hook.remove()
    q, k, _ = seen[0]
    scores = (q[:, :, :1] @ k.transpose(2, 3)) / q.shape[3] ** 0.5
    return scores.softmax(3)[:, :, 0, network.prefix :]


@torch.no_grad()
def patch_colours(tokens: Tensor) -> Tensor:
    """The first three principal components of patches `[B, patches, C]`, in 0..1: `[B, patches, 3]`."""
    x = tokens.flatten(0, 1).double()
    x = x - x.mean(0)
    _, _, axes = torch.linalg.svd(x, full_matrices=False)
    axes = F.pad(axes[:3], (0, 0, 0, 3 - min(len(axes), 3)))
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    colours = x @ (axes * signs).t()
    low, high = (torch.quantile(colours, q, dim=0) for q in (FAINT, BRIGHT))
    return ((colours - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(*tokens.shape[:2], 3).float()


def _enlarged(values: Tensor) -> np.ndarray:
    """Values `[patches]` or `[patches, 3]` in 0..1 of a square grid as pixels uint8 `[SIDE, SIDE, 3]`."""
    side = round(len(values) ** 0.5)
    maps = values.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(maps, (SIDE, SIDE), mode="nearest")[0].permute(1, 2, 0).expand(-1, -1, 3)
    return (255 * pixels).round().byte().numpy()


def pictures_page(models: Sequence[ExportedModel], images: Sequence[Picture]) -> str:
    """HTML: for each image a row of pictures of each model. Raises InputError: an image cannot be read."""
    rows: list[list[str]] = [[] for _ in images]
    for model in models:
        try:
            crops = torch.cat([model.preprocess(image) for image in images])
        except ImageError as error:
            raise InputError(f"pictures: expected images, got {error}") from None
        with torch.no_grad():
            colours = patch_colours(model.backbone([crops])[0].patches)
        heads = class_attention(model, crops) if isinstance(model.backbone, PlainViT) else None
        for number, row in enumerate(rows):
            parts = [figure_of(_enlarged(colours[number]), f"{model.subnet}\npatches, first components")]
            for head, attention in enumerate(heads[number] if heads is not None else ()):
                shown = attention / attention.max().clamp_min(1e-12)
                parts.append(figure_of(_enlarged(shown), f"{model.subnet}\nattention, head {head}"))
            row.append(f"<div>{''.join(parts)}</div>")
    channels = models[0].preprocess.channels
    parts = [
        f"{figure_of(picture_of(image, channels), str(image), 'query')}{''.join(row)}"
        for image, row in zip(images, rows, strict=True)
    ]
    return f"<!DOCTYPE html><html lang=en><meta charset=utf-8><style>{STYLE}</style>{''.join(parts)}</html>\n"


def write_pictures(models: Sequence[ExportedModel], images: Sequence[Picture], out: Path) -> None:
    """Write the page of `pictures_page`."""
    write_text(out, pictures_page(models, images))
