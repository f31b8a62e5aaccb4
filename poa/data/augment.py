"""Random multi-crop augmentation of a uint8 batch on the training device.

Every random parameter is drawn on the CPU before any pixel is touched, so a seed gives the same
views on every device, and each colour operation runs only on the samples that were drawn for it.
Pixels are float32 in 0..255 from the resampling to the normalisation: unlike the official pipeline,
which works on 8-bit images, nothing is rounded in between.

Source: DINO (Caron et al., 2021) and DINOv2 (Oquab et al., 2023) for the views; the operations
follow torchvision's transforms, and the resampling Pillow's bicubic filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.config import CropsConfig
from poa.device import upload

TRIES = 10  # random boxes tried before the largest central one is taken
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L

Operation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Views:
    """Random parameters of `N = views * batch` crops: all samples of the first view, then the next.

    Attributes:
        boxes: int64 `[N, 4]`, (top, left, height, width) in pixels.
        flip: bool `[N]`, mirrored left to right.
        angle: float32 `[N]`, degrees counter-clockwise.
        jitter: bool `[N]`, whether the colours are jittered.
        factors: float32 `[N, 4]` of brightness, contrast, saturation (1: unchanged), hue (turns).
        order: int64 `[N, 4]`, the operations (columns of `factors`) in the order of application.
        grayscale: bool `[N]`.
        sigma: float32 `[N]`, of the Gaussian blur in pixels; 0: no blur.
        solarize: bool `[N]`.
    """

    boxes: Tensor
    flip: Tensor
    angle: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    sigma: Tensor
    solarize: Tensor


def augment(
    images: Tensor, sizes: Tensor, config: CropsConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw and make the two global views and the local views of a batch.

    Args:
        images: uint8 `[B, 3, H, W]`; image b fills the top left `sizes[b]` pixels of its canvas,
            and what is outside never reaches a crop.
        sizes: int64 `[B, 2]` on the CPU, (height, width) in pixels.
        config: of the crops.
        generator: a CPU generator, the only source of randomness.

    Returns:
        Normalised float32 global crops `[2 * B, 3, S, S]` and local crops
        `[local_count * B, 3, s, s]`, both view by view.

    Raises:
        TypeError: `images` or `sizes` of another dtype.
        ValueError: other shapes, sizes that do not fit the canvas, or a blur too wide for the
            crops.
    """
    _check_batch(images, sizes)
    global_views, local_views = draw_views(config, sizes, generator)
    pixels = _pixels(images)
    return (
        _render(pixels, global_views, config.global_size, config),
        _render(pixels, local_views, config.local_size, config),
    )


def eval_crop(
    images: Tensor,
    sizes: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: int | None = None,
) -> Tensor:
    """Resize the shorter side to `resize`, keep the central `size` pixels square, normalise.

    Only the part of the image that ends up in the crop is resampled, in one go, with taps that
    reach beyond it as they would if the whole image was resized. With `resize == size` that part is
    the largest central square.

    Args:
        images: uint8 `[B, 3, H, W]`, as for `augment`.
        sizes: int64 `[B, 2]` on the CPU, (height, width) in pixels.
        size: side of the crop in pixels.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        resize: shorter side in pixels, at least `size`; default `size * 256 / 224`, rounded.

    Returns:
        float32 `[B, 3, size, size]`.

    Raises:
        TypeError: `images` or `sizes` of another dtype.
        ValueError: other shapes, sizes that do not fit the canvas, or `resize` below `size`.
    """
    _check_batch(images, sizes)
    resize = round(size * 256 / 224) if resize is None else resize
    if not 1 <= size <= resize:
        raise ValueError(f"expected 1 <= size <= resize, got size {size} and resize {resize}")
    resized = resize * sizes // sizes.amin(1, keepdim=True)
    scale = sizes / resized
    corner = ((resized - size) / 2).round() * scale
    boxes = torch.cat([corner, size * scale], 1)
    limits = torch.cat([torch.zeros_like(sizes), sizes], 1)
    boxes, limits, shift, gain = _upload_parts(
        [boxes, limits.float(), *_normalisation(mean, std)], images.device
    )
    taps = _taps(scale.amax(0).tolist())
    crops = _resample(_pixels(images), boxes, limits, (size, size), None, taps)
    return crops.mul_(gain).sub_(shift)


def resample(images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """Cut boxes out and resize them with Pillow's antialiased bicubic filter: two matrix products.

    As in torchvision, which crops before it resizes, a crop depends on no pixel outside of its box.
    (Pillow's own `resize(box=...)` also reads the image around the box.) Of a box with fractional
    edges, the pixels it touches are used.

    Args:
        images: uint8 `[B, C, H, W]`.
        boxes: real `[N, 4]`, (top, left, height, width) in pixels, on the CPU (better: only then
            the number of filter taps is known on the host) or on the device. `N` is a multiple of
            `B`; box n belongs to image `n % B`.
        size: (height, width) of the output in pixels.
        flip: bool `[N]`, the crops to mirror left to right.

    Returns:
        float32 `[N, C, *size]` in 0..255.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: other shapes, or boxes on the CPU that are empty or leave the canvas.
    """
    _check_images(images)
    _check_boxes(boxes, images.shape)
    if min(size) < 1:
        raise ValueError(f"expected a size of at least 1 x 1 pixels, got {size}")
    if flip is not None and flip.shape != boxes.shape[:1]:
        raise ValueError(f"expected flip [{len(boxes)}], got {list(flip.shape)}")
    taps: Sequence[int] = images.shape[2:]
    if boxes.device.type == "cpu" and len(boxes):
        largest = boxes[:, 2:].amax(0).tolist()
        taps = _taps([pixels / s for pixels, s in zip(largest, size, strict=True)])
    boxes = boxes.float()
    if boxes.device != images.device:
        boxes = upload(boxes, images.device)
    if flip is not None and flip.device != images.device:
        flip = upload(flip, images.device)
    return _resample(_pixels(images), boxes, _touched(boxes), size, flip, taps)


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
        ValueError: other shapes, boxes that leave the canvas, or a blur too wide for the crops.
    """
    _check_images(images, channels=3)
    _check_boxes(views.boxes, images.shape)
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


def _render(pixels: Tensor, views: Views, size: int, config: CropsConfig) -> Tensor:
    """`render` from pixels in the dtype of the matrix products."""
    steps = _plan(views, size, config)
    rows = _upload_parts([rows for _, rows, _ in steps], pixels.device)
    boxes, flip, angle, shift, gain, *amounts = _upload_parts(
        [
            views.boxes.float(),
            views.flip.float(),
            views.angle,
            *_normalisation(config.mean, config.std),
            *(amounts for _, _, amounts in steps),
        ],
        pixels.device,
    )
    if not len(boxes):
        return boxes.new_empty(0, 3, size, size)
    taps = _taps((views.boxes[:, 2:].amax(0) / size).tolist())
    crops = _resample(pixels, boxes, _touched(boxes), (size, size), flip > 0, taps)
    if config.rotation:
        crops = _rotate(crops, angle)
    for (operation, _, _), chosen, amount in zip(steps, rows, amounts, strict=True):
        changed = operation(crops.index_select(0, chosen), amount.view(-1, 1, 1, 1))
        crops.index_copy_(0, chosen, changed)
    return crops.mul_(gain).sub_(shift)


def _plan(views: Views, size: int, config: CropsConfig) -> list[tuple[Operation, Tensor, Tensor]]:
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
    if views.sigma.any():
        _check_blur(config.blur_kernel, size)
    masks.append((_blur(config.blur_kernel), views.sigma > 0, views.sigma))
    masks.append((_solarize, views.solarize, none))
    plan = [(operation, mask.nonzero().flatten(), amount) for operation, mask, amount in masks]
    return [(operation, rows, amount[rows]) for operation, rows, amount in plan if len(rows)]


def _resample(
    pixels: Tensor,
    boxes: Tensor,
    limits: Tensor,
    size: tuple[int, int],
    flip: Tensor | None,
    taps: Sequence[int],
) -> Tensor:
    """`resample` with all its tensors on the device.

    Args:
        pixels: `[B, C, H, W]` in the dtype of the matrix products.
        boxes: float32 `[N, 4]`, (top, left, height, width).
        limits: float32 `[N, 4]`, (top, left, bottom, right) of the pixels that may be read.
        size: of the output.
        flip: bool `[N]`.
        taps: upper bounds of the pixels a filter covers, (vertically, horizontally).
    """
    batch, channels, height, width = pixels.shape
    views = len(boxes) // batch

    def by_image(x: Tensor) -> Tensor:
        return x.unflatten(0, (views, batch)).transpose(0, 1).flatten(0, 1)

    boxes, limits = by_image(boxes), by_image(limits)
    flip = None if flip is None else by_image(flip)
    rows, columns = (
        _filters(boxes[:, axis::2], limits[:, axis::2], size[axis], extent, taps[axis], mirror)
        for axis, extent, mirror in ((0, height, None), (1, width, flip))
    )
    # In this order no operand is copied: all the views of an image share the first product, whose
    # output [image, view, column, channel, pixel row] is just what the second one contracts.
    # Horizontal first and clipped in between is also what Pillow does (since 13, by the shape).
    with torch.autocast(pixels.device.type, enabled=False):
        shrunk = torch.bmm(
            columns.to(pixels.dtype).view(batch, views * size[1], width),
            pixels.view(batch, channels * height, width).transpose(1, 2),
        )
        shrunk.clamp_(0, 255)
        crops = torch.bmm(
            shrunk.view(batch * views, size[1] * channels, height),
            rows.to(pixels.dtype).transpose(1, 2),
        )
    crops = crops.view(batch, views, size[1], channels, size[0]).permute(1, 0, 3, 4, 2)
    crops = crops.to(torch.float32, memory_format=torch.contiguous_format)
    return crops.reshape(views * batch, channels, *size).clamp_(0, 255)


def _filters(
    spans: Tensor, limits: Tensor, size: int, extent: int, taps: int, mirror: Tensor | None
) -> Tensor:
    """Bicubic filters (a = -0.5) of one axis, widened by the scale when shrinking, as Pillow's.

    Args:
        spans: `[N, 2]`, start and length of the part that is resized.
        limits: `[N, 2]`, first and end of the pixels that may be read.
        size: output pixels.
        extent: input pixels.
        taps: upper bound of the pixels a filter covers.
        mirror: bool `[N]`, output in reverse.

    Returns:
        float32 `[N, size, extent]`; rows sum to 1.
    """
    start, length = spans[:, :1], spans[:, 1:]
    scale = length / size
    position = torch.arange(size, device=spans.device).expand(len(spans), -1)
    if mirror is not None:
        position = torch.where(mirror.unsqueeze(1), size - 1 - position, position)
    center = start + (position + 0.5) * scale
    widening = scale.clamp(min=1)
    # A window of `taps` pixels holds the whole filter; inside of the canvas it has no index twice.
    taps = min(taps, extent)
    first = (center - 2 * widening - 0.5).ceil().clamp(0, extent - taps)
    index = first.unsqueeze(-1) + torch.arange(taps, device=spans.device)
    weight = _bicubic((index + 0.5 - center.unsqueeze(-1)) / widening.unsqueeze(-1))
    weight *= (index >= limits[:, :1, None]) & (index < limits[:, 1:, None])
    weight /= weight.sum(-1, keepdim=True)
    return weight.new_zeros(*weight.shape[:2], extent).scatter_(-1, index.long(), weight)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = x.abs().clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def _taps(scales: Sequence[float]) -> list[int]:
    """Most pixels a bicubic filter covers along each axis, given the largest scales."""
    return [math.ceil(4 * max(scale, 1.0)) + 1 for scale in scales]


def _touched(boxes: Tensor) -> Tensor:
    """(top, left, bottom, right) of the pixels that boxes (top, left, height, width) touch."""
    return torch.cat([boxes[:, :2].floor(), (boxes[:, :2] + boxes[:, 2:]).ceil()], 1)


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


def _pixels(images: Tensor) -> Tensor:
    """The images in the dtype of the matrix products.

    On a GPU that is half precision, which holds 0..255 exactly and lets tensor cores do the work;
    crops are then off by about 0.04 levels, and by up to 0.3 where neighbours differ most.
    """
    return images.contiguous().to(torch.float16 if images.is_cuda else torch.float32)


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Shift and gain `[3, 1, 1]` with `(x / 255 - mean) / std = x * gain - shift`."""
    center = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
    deviation = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    return center / deviation, 1 / (255 * deviation)


def _upload_parts(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy CPU tensors of one dtype to the device in one transfer."""
    if not parts:
        return []
    flat = upload(torch.cat([part.flatten() for part in parts]), device)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _check_images(images: Tensor, channels: int | None = None) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"expected uint8 images, got {images.dtype}")
    if images.ndim != 4 or channels not in (None, images.shape[1]) or 0 in images.shape:
        expected = f"[B, {channels or 'C'}, H, W]"
        raise ValueError(f"expected images {expected}, none of it 0, got {list(images.shape)}")


def _check_batch(images: Tensor, sizes: Tensor) -> None:
    _check_images(images, channels=3)
    if sizes.dtype != torch.int64:
        raise TypeError(f"expected int64 sizes, got {sizes.dtype}")
    if sizes.shape != (len(images), 2) or sizes.device.type != "cpu":
        got = f"{list(sizes.shape)} on {sizes.device}"
        raise ValueError(f"expected sizes [{len(images)}, 2] on the CPU, got {got}")
    canvas = images.shape[2:]
    if ((sizes < 1) | (sizes > torch.tensor(canvas))).any():
        low, high = sizes.amin(0).tolist(), sizes.amax(0).tolist()
        raise ValueError(f"expected sizes from [1, 1] to {list(canvas)}, got {low} to {high}")


def _check_boxes(boxes: Tensor, shape: Sequence[int]) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) % shape[0]:
        got = list(boxes.shape)
        raise ValueError(f"expected boxes [N, 4] with N a multiple of {shape[0]}, got {got}")
    if boxes.device.type != "cpu":
        return  # looking at them would wait for the device
    end = boxes[:, :2] + boxes[:, 2:]
    outside = (boxes[:, :2] < 0) | (boxes[:, 2:] <= 0) | (end > torch.tensor(shape[2:]))
    wrong = outside.any(1).nonzero().flatten()
    if len(wrong):
        canvas, got = list(shape[2:]), boxes[wrong[0]].tolist()
        raise ValueError(f"expected boxes (top, left, height, width) in {canvas}, got {got}")


def _check_blur(kernel: int, size: int) -> None:
    if kernel % 2 == 0 or kernel // 2 >= size:
        limit = f"below {2 * size} for crops of {size} pixels"
        raise ValueError(f"expected an odd blur_kernel {limit}, got {kernel}")
