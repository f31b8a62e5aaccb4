"""A picture of what a run sees: some of its images, and the crops that are made of them."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from poa.config import Config
from poa.data.augment import augment
from poa.data.decode import to_picture
from poa.data.loader import evaluation_batches
from poa.errors import InputError
from poa.random import torch_stream

IMAGES, LOCAL = 6, 6  # rows, and at most so many local crops in each
GAP = 2  # pixels


def contact_sheet(config: Config) -> bytes:
    """A PNG with a row for each image: itself, its two global crops, its local crops. Raises InputError: the
    images are missing or unreadable."""
    method, crops = config.method, config.method.crops
    source = config.open().train
    spread = np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(np.int64))
    batch = next(iter(evaluation_batches(source.subset(spread), method.canvas, 0)))
    count, side = len(batch.images), crops.global_size
    if not count:
        raise InputError("data: expected readable images, could read none of those tried")
    views = augment(batch.images, batch.sizes, crops, torch_stream(method.seed, "augment", 0, 0))
    std, mean = (torch.tensor(values)[:, None, None] for values in (crops.std, crops.mean))
    local = min(crops.local_count, LOCAL)
    sheet = Image.new("RGB", ((3 + local) * (side + GAP), count * (side + GAP)), "white")
    for row, (image, (height, width)) in enumerate(zip(batch.images, batch.sizes.tolist(), strict=True)):
        seen = [*views[0][row::count], *views[1][row::count][:local]]
        pixels = [((crop * std + mean).clamp(0, 1) * 255).round().byte() for crop in seen]
        for column, tile in enumerate([image[:, :height, :width], *pixels]):
            picture = to_picture(tile.permute(1, 2, 0).numpy())
            picture.thumbnail((side, side))
            sheet.paste(picture, (column * (side + GAP), row * (side + GAP)))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
