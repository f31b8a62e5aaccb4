"""Random multi-crop augmentation of a uint8 batch on the training device.

Every random parameter is drawn on the CPU before any pixel is touched, so a seed gives the same
views on every device, and each colour operation runs only on the samples that were drawn for it.
On a GPU all of it is a handful of kernels, `elastic_kernels.render_crops`; what is here is the definition.
Pixels are float32 in 0..255 from the resampling to the normalisation: unlike the official pipeline,
which works on 8-bit images, nothing is rounded in between.

Source: DINO (Caron et al., 2021) and DINOv2 (Oquab et al., 2023) for the views; the operations
follow torchvision's transforms, and the resampling Pillow's bicubic filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import NEUTRAL_CROP, CropParameters, crops_backend, render_crops, upload
from poa.data.crops import CropsConfig
from poa.data.resample import (
    check_batch,
    check_boxes,
    check_images,
    filter_taps,
    normalisation,
    product_pixels,
    resample_on_device,
    touched_pixels,
    upload_parts,
)

TRIES = 10  # random boxes tried before the largest central one is taken
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L

Operation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Views(CropParameters):
    """Random parameters of crops, in whole pixels, and their rotation.

    Attributes:
        angle: float32 `[N]`, degrees counter-clockwise.
    """

    angle: Tensor


def augment(
    images: Tensor,
    sizes: Tensor,
    config: CropsConfig,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Draw and make the two global views and the local views of a batch.

    Args:
        images: uint8 `[B, 3, H, W]`; image b fills the top left `sizes[b]` pixels of its canvas,
            and what is outside never reaches a crop.
        sizes: int64 `[B, 2]` on the CPU, (height, width) in pixels.
        config: of the crops.
        generator: a CPU generator, the only source of randomness.
        dtype: of the crops.

    Returns:
        Normalised global crops `[2 * B, 3, S, S]` and local crops
        `[local_count * B, 3, s, s]`, both view by view.

    Raises:
        TypeError: `images` or `sizes` of another dtype.
        ValueError: other shapes, or sizes that do not fit the canvas.
    """
    check_batch(images, sizes)
    global_views, local_views = draw_views(config, sizes, generator)
    pixels = _pixels(images)
    return (
        _render(pixels, global_views, config.global_size, config, dtype),
        _render(pixels, local_views, config.local_size, config, dtype),
    )


def draw_views(config: CropsConfig, sizes: Tensor, generator: torch.Generator) -> tuple[Views, Views]:
    """Draw the parameters of the two global views and of the `local_count` local views.

    How much is drawn does not depend on which operations are switched on, so switching one off
    leaves the others as they were.

    Args:
        config: of the crops.
        sizes: int64 `[B, 2]` on the CPU, (height, width) of the images in pixels.
        generator: a CPU generator.
    """
    blur, solarize = config.blur, config.solarize
    count = config.local_count
    return (
        _draw(config, sizes, config.global_scale, blur[:2], solarize[:2], generator),
        _draw(config, sizes, config.local_scale, blur[2:] * count, solarize[2:] * count, generator),
    )


def render(images: Tensor, views: Views, size: int, config: CropsConfig) -> Tensor:
    """Make the crops of given parameters: the deterministic half of `augment`.

    Args:
        images: uint8 `[B, 3, H, W]`.
        views: of `N` crops, a multiple of `B`.
        size: side of the crops in pixels.
        config: for the operations that are on, the blur's kernel, the mean and the deviation.

    Returns:
        Normalised float32 `[N, 3, size, size]`.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: other shapes, or boxes that leave the canvas.
    """
    check_images(images, channels=3)
    check_boxes(views.boxes, images.shape)
    return _render(_pixels(images), views, size, config)


def _draw(
    config: CropsConfig,
    sizes: Tensor,
    scale: tuple[float, float],
    blur: Sequence[float],
    solarize: Sequence[float],
    generator: torch.Generator,
) -> Views:
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
    factors = [uniform(max(0.0, 1 - s), 1 + s) for s in strengths]
    return Views(
        boxes=_draw_boxes(sizes, scale, config.aspect, generator),
        flip=chance(config.flip),
        angle=uniform(-config.rotation, config.rotation),
        jitter=chance(config.jitter),
        factors=torch.stack([*factors, uniform(-config.hue, config.hue)], 1),
        order=torch.rand(count, 4, generator=generator).argsort(1),
        grayscale=chance(config.grayscale),
        sigma=uniform(*config.blur_sigma) * chance(blur),
        solarize=chance(solarize),
    )


def _draw_boxes(
    sizes: Tensor,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
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


def _pixels(images: Tensor) -> Tensor:
    """What `_render` takes: the canvases as they are for the fused kernels, else in the products' dtype."""
    return images if crops_backend(images).backend == "triton" else product_pixels(images)


def _render_fused(images: Tensor, views: Views, size: int, config: CropsConfig, dtype: torch.dtype) -> Tensor:
    """`render` by the fused kernels."""
    strengths = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    rotate = None
    if config.rotation:
        angle = upload(views.angle, images.device)

        def rotate(crops: Tensor) -> Tensor:
            return _rotate(crops, angle)

    factors = torch.where(strengths != 0, views.factors, torch.tensor(NEUTRAL_CROP))
    return render_crops(
        images,
        replace(views, factors=factors),
        size,
        blur_kernel=config.blur_kernel,
        mean=config.mean,
        std=config.std,
        dtype=dtype,
        rotate=rotate,
    )


def _render(
    pixels: Tensor, views: Views, size: int, config: CropsConfig, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`render` from what `_pixels` makes of the canvases."""
    if pixels.dtype == torch.uint8:
        return _render_fused(pixels, views, size, config, dtype)
    steps = _plan(views, config)
    rows = upload_parts([rows for _, rows, _ in steps], pixels.device)
    boxes, flip, angle, shift, gain, *amounts = upload_parts(
        [
            views.boxes.float(),
            views.flip.float(),
            views.angle,
            *normalisation(config.mean, config.std),
            *(amounts for _, _, amounts in steps),
        ],
        pixels.device,
    )
    if not len(boxes):
        return boxes.new_empty(0, 3, size, size, dtype=dtype)
    taps = filter_taps((views.boxes[:, 2:].amax(0) / size).tolist())
    crops = resample_on_device(pixels, boxes, touched_pixels(boxes), (size, size), flip > 0, taps)
    if config.rotation:
        crops = _rotate(crops, angle)
    for (operation, _, _), chosen, amount in zip(steps, rows, amounts, strict=True):
        changed = operation(crops.index_select(0, chosen), amount.view(-1, 1, 1, 1))
        crops.index_copy_(0, chosen, changed)
    return crops.mul_(gain).sub_(shift).to(dtype)


def _plan(views: Views, config: CropsConfig) -> list[tuple[Operation, Tensor, Tensor]]:
    """The colour operations in order, each with the crops it changes (int64) and their amounts."""
    masks: list[tuple[Operation, Tensor, Tensor]] = []
    jitter: list[tuple[Operation, float]] = [
        (_brightness, config.brightness),
        (_contrast, config.contrast),
        (_saturation, config.saturation),
        (_hue, config.hue),
    ]
    for turn in views.order.T:
        for column, (operation, strength) in enumerate(jitter):
            if strength:
                masks.append((operation, views.jitter & (turn == column), views.factors[:, column]))
    none = torch.zeros_like(views.sigma)
    masks.append((_saturation, views.grayscale, none))
    masks.append((_blur(config.blur_kernel), views.sigma > 0, views.sigma))
    masks.append((_solarize, views.solarize, none))
    plan = [(operation, mask.nonzero().flatten(), amount) for operation, mask, amount in masks]
    return [(operation, rows, amount[rows]) for operation, rows, amount in plan if len(rows)]


def _rotate(crops: Tensor, angle: Tensor) -> Tensor:
    """Rotate crops about their centre by degrees `[N]`, bilinear; what is missing is reflected."""
    radians = angle * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, padding_mode="reflection", align_corners=False)


def _luma(x: Tensor) -> Tensor:
    """Brightness `[n, 1, h, w]` of colours `[n, 3, h, w]`."""
    red, green, blue = x.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 255)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).mean((1, 2, 3), keepdim=True)
    return torch.addcmul(mean * (1 - factor), x, factor).clamp_(0, 255)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image; a factor of 0 makes the image gray."""
    return torch.addcmul(_luma(x).mul_(1 - factor), x, factor).clamp_(0, 255)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns, keeping HSV saturation and value.

    Both follow from the largest and smallest channel, which therefore stay; between the two, each
    channel is a trapezoid function of the hue.
    """
    red, green, blue = x.split(1, 1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    from_green = (blue - red).add_(chroma, alpha=2)
    from_blue = (red - green).add_(chroma, alpha=4)
    sixths = torch.where(high == green, from_green, from_blue)
    sixths = torch.where(high == red, green - blue, sixths)
    # Gray has no hue: 0 / tiny is as good as any.
    sixths = sixths.div_(chroma.clamp(min=1e-6)).add_(6 * shift)
    sixths -= 6 * (sixths / 6).floor_()
    out = torch.empty_like(x)
    for channel, (peak, side, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (sixths - peak).abs_().mul_(side).add_(offset).clamp_(0, 1)
        torch.addcmul(low, share, chroma, out=out[:, channel : channel + 1])
    return out


def _solarize(x: Tensor, _: Tensor) -> Tensor:
    """Invert from 128 up, which for integers is the smaller of the value and its inverse."""
    return torch.minimum(x, 255 - x)


def _blur(kernel: int) -> Operation:
    """Gaussian blur with `kernel` taps, its amount being sigma; the border is reflected."""

    def blur(x: Tensor, sigma: Tensor) -> Tensor:
        reach = kernel // 2
        offset = torch.arange(-reach, reach + 1, device=x.device)
        weight = (-0.5 * (offset / sigma).square()).softmax(-1)
        # On a CPU, a sum of shifted images is faster than a convolution with a group per image.
        for dim, border in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
            padded = F.pad(x, border, mode="reflect")
            x = padded.narrow(dim, 0, x.shape[dim]) * weight[..., :1]
            for tap in range(1, kernel):
                x.addcmul_(padded.narrow(dim, tap, x.shape[dim]), weight[..., tap : tap + 1])
        return x

    return blur
