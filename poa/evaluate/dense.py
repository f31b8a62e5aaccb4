"""What protocols of pixels share: windows of images with a target for each pixel, and their patch tokens.

Images are stretched to the square that the network sees, or, with `short_side`, resized with their aspect and
seen in such squares that slide over them and overlap by a third or more; what is predicted in several is
averaged. Predictions are scored at the size of the targets.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor, nn

from poa.backbones import Backbone
from poa.data.crops import CropsConfig
from poa.data.decode import decode
from poa.data.summary import LeftOut
from poa.errors import InputError, one_line
from poa.evaluate.features import Bank
from poa.files import open_regular
from poa.options import Options, option
from poa.random import torch_stream
from poa.subnets import Subnet

SAMPLE = 2000  # windows whose tokens tell mean and deviation
LARGEST = 4096  # pixels of a side; larger images and their targets have no common size any more


@dataclass(frozen=True)
class DenseConfig(Options):
    """How images are seen, and how a linear layer on patch tokens is trained: AdamW, cosine schedule."""

    steps: int = option(1000, "steps", "[1, 1e7]")
    batch_size: int = option(16, "windows per step", "[1, 4096]")
    lr: float = option(1e-3, "learning rate at the beginning", "(0, 10]")
    weight_decay: float = option(1e-3, "weight decay", "[0, 1]")
    short_side: int = option(
        0,
        "pixels of the shorter side of images, over which windows slide; 0: images are stretched",
        "[0, 4096]",
    )
    images: int = option(0, "at most so many images of each part, spread over it; 0: all", "[0, inf)")


class Fault(Exception):
    """A target cannot be used; the message is the reason that is counted, and what was got stands with the
    example."""

    def __init__(self, reason: str, got: object = ""):
        super().__init__(reason)
        self.got = got


class Pair(NamedTuple):
    """An image, and what reads the target `[H, W]` of its pixels or raises `Fault`."""

    image: Path
    target: Callable[[], np.ndarray]


class Placed(NamedTuple):
    """Top and left of each window of an image that was resized to a size; its target `[H, W]` has its own
    size."""

    size: tuple[int, int]
    corners: list[tuple[int, int]]
    target: Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of images, in order.

    Attributes:
        images: uint8 `[N, C, S, S]`, in a file.
        targets: `[N, S, S]`, nearest pixels.
        placed: of each image.
        crops: mean and standard deviation of pixels.
    """

    images: np.ndarray
    targets: Tensor
    placed: list[Placed]
    crops: CropsConfig

    def tokens(self, backbone: Backbone, subnet: Subnet, batch: int, device: torch.device) -> Tensor:
        """Patch tokens float16 `[N, patches, width]`, on the CPU or in a file."""
        std, mean = (torch.tensor(v, device=device)[:, None, None] for v in (self.crops.std, self.crops.mean))
        bank = Bank(len(self.images))
        for start in range(0, len(self.images), batch):
            pixels = torch.from_numpy(self.images[start : start + batch].copy()).to(device)
            (features,) = backbone([(pixels.float() / 255 - mean) / std], subnet)
            bank.add(features.patches.half().cpu())
        return bank.rows()

    def predictions(self, maps: Callable[[slice], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each image what is predicted, `[K, H, W]`, and its target, `[H, W]`.

        `maps` gives predictions `[n, K, side, side]` of a slice of the windows.
        """
        start, size = 0, self.images.shape[-1]
        for (height, width), corners, target in self.placed:
            parts = maps(slice(start, start + len(corners))).float()
            start += len(corners)
            parts = F.interpolate(parts, (size, size), mode="bilinear", align_corners=False)
            whole, seen = parts.new_zeros(parts.shape[1], height, width), parts.new_zeros(height, width)
            for part, (top, left) in zip(parts, corners, strict=True):
                whole[:, top : top + size, left : left + size] += part
                seen[top : top + size, left : left + size] += 1
            whole = (whole / seen)[None]
            yield F.interpolate(whole, target.shape, mode="bilinear", align_corners=False)[0].cpu(), target


def read_windows(
    pairs: Sequence[Pair], crops: CropsConfig, options: DenseConfig, left_out: LeftOut, expected: str
) -> Windows:
    """Windows of images of the size of `crops` with their targets; `left_out` counts what cannot be used.

    Raises InputError: `expected`, there is no image that can be used.
    """
    size, placed, targets = crops.global_size, list[Placed](), list[Tensor]()
    if options.images and options.images < len(pairs):
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, options.images).astype(int)]
    with tempfile.TemporaryFile() as file:
        for pair in pairs:
            if (read := read_pair(pair, len(crops.mean), left_out)) is None:
                continue
            image, target = read
            height, width = _resized(target.shape, size, options.short_side)
            x = F.interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)
            x = x.round().clamp(0, 255).byte()[0]
            y = F.interpolate(target[None, None].float(), (height, width), mode="nearest")[0, 0]
            corners = [(top, left) for top in _starts(height, size) for left in _starts(width, size)]
            for top, left in corners:
                file.write(x[:, top : top + size, left : left + size].contiguous().numpy().tobytes())
                targets.append(y[top : top + size, left : left + size].to(target.dtype))
            placed.append(Placed((height, width), corners, target))
        if not placed:
            raise InputError(f"{expected}, got none ({left_out or 'no images there'})")
        file.flush()
        shape = (len(targets), len(crops.mean), size, size)
        images = np.memmap(file, np.uint8, "r", shape=shape)
    return Windows(images, torch.stack(targets), placed, crops)


def pictures(folder: Path) -> list[Path]:
    """The files of a folder that are not hidden, by name."""
    return sorted(folder.glob("[!.]*"))


@contextmanager
def open_png(path: Path) -> Iterator[ImageFile]:
    """A PNG; for other files Pillow may start programs, and pipes are waited for. Raises Fault: it is
    none."""
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as picture:
            yield picture
    except UnidentifiedImageError:
        raise Fault("targets that are no PNG") from None


def png_numbers(path: Path, kind: str, *rawmodes: str) -> np.ndarray:
    """The numbers `[H, W]` in a PNG. Raises Fault: its pixels are not of this `kind`, by their raw mode."""
    with open_png(path) as file:
        if (mode := str(file.tile[0][3])) not in rawmodes:
            raise Fault(f"targets that are no PNG of {kind}", mode)
        return np.asarray(file)


def read_pair(pair: Pair, channels: int, left_out: LeftOut) -> tuple[Tensor, Tensor] | None:
    """Pixels uint8 `[C, H, W]` and target `[H, W]`; None, which is counted, where they cannot be used."""
    try:
        with open_regular(pair.image) as file:
            pixels = decode(file, LARGEST, channels=channels)
        target = pair.target()
        if target.shape != pixels.shape[:2]:
            raise Fault("targets of another size than their image", f"{target.shape} of {pixels.shape[:2]}")
    except Fault as fault:
        left_out.add(str(fault), f"{pair.image}: {fault.got}" if fault.got != "" else str(pair.image))
        return None
    except FileNotFoundError as error:
        left_out.add("images or targets that are missing", str(error.filename))
        return None
    except Exception as error:  # damaged files raise what they like, see `decode_sized`
        left_out.add("images or targets that cannot be read", f"{pair.image}: {one_line(error)}")
        return None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.from_numpy(target.copy())


def _resized(shape: Sequence[int], window: int, short_side: int) -> tuple[int, int]:
    """Height and width that an image is seen in."""
    if not short_side:
        return window, window
    scale = max(short_side, window) / min(shape)
    return max(round(shape[0] * scale), window), max(round(shape[1] * scale), window)


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover a length, evenly, and overlap by a third or more."""
    rest = length - window
    count = 1 + math.ceil(rest / (2 * window / 3))
    return [round(i * rest / max(count - 1, 1)) for i in range(count)]


def fit_layer(
    tokens: Tensor,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    options: DenseConfig,
    seed: int,
    device: torch.device,
) -> Callable[[Tensor], Tensor]:
    """A linear layer on standardised tokens, trained.

    Args:
        tokens: `[N, P, C]` of training windows.
        outputs: of the layer.
        loss: of its outputs `[B, P, outputs]` and of the numbers `[B]` of their windows.
        options: of the training.
        seed: of weights and batches.
        device: to compute on.

    Returns:
        From tokens `[n, P, C]` to outputs `[n, P, outputs]`, on the device.
    """
    draw = torch_stream(seed, "dense")
    some = tokens[torch.linspace(0, len(tokens) - 1, min(len(tokens), SAMPLE)).long()].flatten(0, 1).float()
    mean, deviation = some.mean(0).to(device), some.std(0).to(device) + 1e-5
    layer = nn.Linear(tokens.shape[2], outputs)
    nn.init.normal_(layer.weight, std=0.01, generator=draw)
    nn.init.zeros_(layer.bias)
    layer = layer.to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    def outputs_of(x: Tensor) -> Tensor:
        result: Tensor = layer((x.to(device).float() - mean) / deviation)
        return result

    with torch.enable_grad():
        for _ in range(options.steps):
            chosen = torch.randint(len(tokens), (options.batch_size,), generator=draw)
            value = loss(outputs_of(tokens[chosen]), chosen)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    return outputs_of


def to_maps(values: Tensor) -> Tensor:
    """Of the patches of square windows `[n, P, K]`: `[n, K, side, side]`."""
    side = math.isqrt(values.shape[1])
    return values.transpose(1, 2).unflatten(2, (side, side))
