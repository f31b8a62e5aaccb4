"""Pictures of what subnets see, as a page or a PNG.

colours      the first three principal components of the patch tokens
attention    of the class token to the patches in the last block, by head
matches      patches of two images that are each other's most alike, joined by lines
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from poa.backbones.plain import PlainViT
from poa.data.decode import ImageError, to_picture
from poa.data.preprocessing import Picture, Preprocessing
from poa.embedding.nearest import SIDE, figure_of, html_page, picture_of
from poa.errors import InputError
from poa.export import ExportedModel
from poa.files import write_bytes, write_text

FAINT, BRIGHT = 0.02, 0.98  # quantiles that become black and white
MATCHES = 16  # lines between two images
GAP, CAPTION = 8, 28  # pixels between pictures of a sheet, and below them for what they show


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


@torch.no_grad()
def matches(left: Tensor, right: Tensor, most: int = MATCHES) -> Tensor:
    """Positions `[pairs, 2]` of patches `[N, C]` and `[M, C]` that are each other's most alike by cosine, the
    most alike first, at most so many."""
    likeness = F.normalize(left.float(), dim=1) @ F.normalize(right.float(), dim=1).t()
    best, there = likeness.max(1)
    mutual = (likeness.argmax(0)[there] == torch.arange(len(left))).nonzero()[:, 0]
    chosen = mutual[best[mutual].argsort(descending=True, stable=True)[:most]]
    return torch.stack([chosen, there[chosen]], 1)


def _joined(crops: Tensor, tokens: Tensor, preprocess: Preprocessing) -> np.ndarray:
    """Two normalised crops `[2, C, S, S]` side by side; lines join matches of `[2, patches, width]`."""
    std, mean = (torch.tensor(values)[:, None, None] for values in (preprocess.std, preprocess.mean))
    seen = (255 * (crops * std + mean).clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
    picture = Image.new("RGB", (2 * SIDE, SIDE))
    for number, pixels in enumerate(seen):
        picture.paste(to_picture(pixels).convert("RGB").resize((SIDE, SIDE)), (number * SIDE, 0))
    draw, grid = ImageDraw.Draw(picture), round(tokens.shape[1] ** 0.5)
    for number, pair in enumerate(matches(*tokens).tolist()):
        rows_columns = [divmod(place, grid) for place in pair]
        ends = [
            (part * SIDE + (column + 0.5) * SIDE / grid, (row + 0.5) * SIDE / grid)
            for part, (row, column) in enumerate(rows_columns)
        ]
        draw.line(ends, fill=f"hsl({360 * number // MATCHES}, 100%, 50%)")
    return np.asarray(picture)


class Drawing(NamedTuple):
    """A picture, uint8 `[H, W, C]`, and what it shows, line by line."""

    pixels: np.ndarray
    about: str

    @property
    def width(self) -> int:
        """Where it is shown, in pixels: twice that of others for two images side by side."""
        return 2 * SIDE if self.pixels.shape[1] > SIDE else SIDE


def drawings(
    models: Sequence[ExportedModel], images: Sequence[Picture], match: Picture | None = None
) -> list[list[list[Drawing]]]:
    """For each image itself, and then what each model sees of it; with `match`, an image, also its matches
    with that. Raises InputError: an image cannot be read."""
    seen = []
    for model in models:
        try:
            crops = torch.cat([model.preprocess(image) for image in (*images, *([match] if match else []))])
        except ImageError as error:
            raise InputError(f"pictures: expected images, got {error}") from None
        seen.append(list(_drawings(model, crops, len(images))))
    channels = models[0].preprocess.channels
    return [
        [[Drawing(picture_of(image, channels), str(image))], *drawn]
        for image, *drawn in zip(images, *seen, strict=True)
    ]


def _drawings(model: ExportedModel, crops: Tensor, images: int) -> Iterator[list[Drawing]]:
    """Of each of the first so many normalised crops; matches are those with the last one."""
    with torch.no_grad():
        patches = model.backbone([crops])[0].patches
    colours = patch_colours(patches[:images])
    heads = class_attention(model, crops[:images]) if isinstance(model.backbone, PlainViT) else None
    for number in range(images):
        drawn = [Drawing(_enlarged(colours[number]), f"{model.subnet}\nprincipal components")]
        for head, attention in enumerate(heads[number] if heads is not None else ()):
            shown = attention / attention.max().clamp_min(1e-12)
            drawn.append(Drawing(_enlarged(shown), f"{model.subnet}\nattention, head {head}"))
        if images < len(crops):
            both = [number, -1]
            joined = _joined(crops[both], patches[both], model.preprocess)
            drawn.append(Drawing(joined, f"{model.subnet}\npatches most alike"))
        yield drawn


def page(rows: Sequence[Sequence[Sequence[Drawing]]]) -> str:
    lines = (
        "".join(figure_of(*d, "wide" if d.width > SIDE else "") for d in drawn)
        for row in rows
        for drawn in row
    )
    return html_page(lines)


def sheet(rows: Sequence[Sequence[Sequence[Drawing]]]) -> Image.Image:
    """`drawings` on one picture: a line for each image, and for each model."""
    lines = [drawn for row in rows for drawn in row]
    columns = max(sum(d.width + GAP for d in drawn) for drawn in lines)
    picture = Image.new("RGB", (columns, len(lines) * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(picture)
    for number, drawn in enumerate(lines):
        x, y = 0, number * (SIDE + CAPTION)
        for drawing in drawn:
            height, width, _ = drawing.pixels.shape
            size = drawing.width, min(round(drawing.width * height / width), SIDE)
            picture.paste(to_picture(drawing.pixels).convert("RGB").resize(size), (x, y))
            for line, text in enumerate(drawing.about.split("\n")):
                shown = text.encode("ascii", "replace").decode()[-SIDE // 6 :]
                draw.text((x, y + SIDE + 12 * line), shown, "black")
            x += drawing.width + GAP
    return picture


def write_pictures(
    models: Sequence[ExportedModel], images: Sequence[Picture], out: Path, match: Picture | None = None
) -> None:
    """Write `drawings`, as PNG where the name ends so, else as a page."""
    rows = drawings(models, images, match)
    if out.suffix == ".png":
        picture = io.BytesIO()
        sheet(rows).save(picture, "PNG")
        write_bytes(out, picture.getvalue())
    else:
        write_text(out, page(rows))
