"""Random multi-crop augmentation of a uint8 batch on the training device.

Every random parameter is drawn on the CPU before any pixel is touched, so a seed gives the same views on
every device; `elastic_kernels.render_crops` makes the crops.

Source: DINO (Caron et al., 2021) and DINOv2 (Oquab et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import CropParameters, check_canvases, render_crops
from poa.data.crops import CropsConfig

TRIES = 10  # random boxes tried before the largest central one is taken


def augment(
    images: Tensor,
    sizes: Tensor,
    config: CropsConfig,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Draw and make the two global views and the local views of a batch.

    Args:
        images: uint8 `[B, C, H, W]`; image b fills the top left `sizes[b]` pixels of its canvas,
            and what is outside never reaches a crop.
        sizes: int64 `[B, 2]` on the CPU, (height, width) in pixels.
        config: of the crops.
        generator: a CPU generator, the only source of randomness.
        dtype: of the crops.

    Returns:
        Normalised global crops `[2 * B, C, S, S]` and local crops
        `[local_count * B, C, s, s]`, both view by view.

    Raises:
        TypeError: `images` or `sizes` of another dtype.
        ValueError: other shapes, or sizes that do not fit the canvas.
    """
    check_canvases(images, sizes)
    global_views, local_views = draw_views(config, sizes, generator)
    return (
        render(images, global_views, config.global_size, config, dtype),
        render(images, local_views, config.local_size, config, dtype),
    )


def random_crops(images: Tensor, sizes: Tensor, config: CropsConfig, generator: torch.Generator) -> Tensor:
    """One random crop of each image, normalised float32 `[B, C, S, S]`, as the first global view; the
    arguments are those of `augment`."""
    check_canvases(images, sizes)
    views = _draw(config, sizes, config.global_scale, config.blur[:1], config.solarize[:1], generator)
    return render(images, views, config.global_size, config)


def draw_views(
    config: CropsConfig, sizes: Tensor, generator: torch.Generator
) -> tuple[CropParameters, CropParameters]:
    """Draw the parameters of the two global views and of the `local_count` local views.

    How much is drawn does not depend on which operations are switched on, so switching one off leaves the
    others as they were. `sizes` and `generator` are as of `augment`.
    """
    blur, solarize = config.blur, config.solarize
    count = config.local_count
    return (
        _draw(config, sizes, config.global_scale, blur[:2], solarize[:2], generator),
        _draw(config, sizes, config.local_scale, blur[2:] * count, solarize[2:] * count, generator),
    )


def render(
    images: Tensor, views: CropParameters, size: int, config: CropsConfig, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Make the crops of given parameters, the deterministic half of `augment`; see `render_crops`."""
    return render_crops(
        images, views, size,
        blur_kernel=config.blur_kernel, mean=config.mean, std=config.std, dtype=dtype,
    )  # fmt: skip


def _draw(
    config: CropsConfig,
    sizes: Tensor,
    scale: tuple[float, float],
    blur: Sequence[float],
    solarize: Sequence[float],
    generator: torch.Generator,
) -> CropParameters:
    """Parameters of `len(blur)` views; `blur` and `solarize` are the probabilities of each."""
    sizes = sizes.repeat(len(blur), 1)
    count = len(sizes)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    def chance(probability: float | Sequence[float]) -> Tensor:
        bound = torch.tensor(probability, dtype=torch.float64)
        if bound.ndim:
            bound = bound.repeat_interleave(count // max(len(bound), 1))
        return torch.rand(count, dtype=torch.float64, generator=generator) < bound

    strengths = (config.brightness, config.contrast, config.saturation)
    factors = [uniform(max(0.0, 1 - s), 1 + s) for s in strengths]  # a strength of 0 leaves them neutral
    boxes, flip = _draw_boxes(sizes, scale, config.aspect, generator), chance(config.flip)
    angle = uniform(-config.rotation, config.rotation)
    return CropParameters(
        boxes=boxes,
        flip=flip,
        angle=angle if config.rotation else None,
        jitter=chance(config.jitter),
        factors=torch.stack([*factors, uniform(-config.hue, config.hue)], 1),
        order=torch.rand(count, 4, generator=generator).argsort(1),
        grayscale=chance(config.grayscale),
        sigma=uniform(*config.blur_sigma) * chance(blur),
        solarize=chance(solarize),
    )


def _draw_boxes(
    sizes: Tensor, scale: tuple[float, float], aspect: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Boxes int64 `[N, 4]` in images of `sizes` `[N, 2]`, as of torchvision's RandomResizedCrop.

    The first of `TRIES` draws of area and aspect ratio that fits is placed at random; if none fits,
    the largest central box with an allowed aspect ratio is taken.
    """
    # Double precision, where rounding cannot take a position past the last valid one.
    full = sizes.double().T
    draws = torch.rand(2, TRIES, len(sizes), dtype=torch.float64, generator=generator)
    area = full.prod(0) * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = (low + (high - low) * draws[1]).exp()
    tried = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).round()
    allowed = full.flip(0) * full.new_tensor([[1 / aspect[0]], [aspect[1]]])
    largest = torch.minimum(full, allowed.round()).clamp(min=1)
    fits = ((tried > 0) & (tried <= full)).all(1)
    choice = F.pad(fits, (0, 0, 0, 1), value=True).int().argmax(0)
    tried = torch.cat([tried, largest.unsqueeze(0)])
    extent = tried.gather(0, choice.expand(1, 2, -1)).squeeze(0)
    room = full - extent
    place = torch.rand(2, len(sizes), dtype=torch.float64, generator=generator)
    corner = torch.where(choice == TRIES, room / 2, place * (room + 1)).floor()
    return torch.cat([corner, extent]).long().T
