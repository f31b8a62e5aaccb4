"""Antialiased resampling of boxes out of uint8 canvases, on their device, as matrix products.

Pixels are float32 in 0..255; the filter is Pillow's bicubic one. An image may fill only the top left part
of its canvas; what is outside never reaches a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elastic_kernels.dispatch import upload

MOST_CHANNELS = 16  # of images


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
        images: uint8 `[B, C, H, W]` of 1 to 16 channels; image b fills the top left `sizes[b]` pixels of its
            canvas.
        sizes: int64 `[B, 2]` on the CPU, (height, width) in pixels.
        size: side of the crop in pixels.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        resize: shorter side in pixels, at least `size`; default `size * 256 / 224`, rounded.

    Returns:
        float32 `[B, C, size, size]`.

    Raises:
        TypeError: `images` or `sizes` of another dtype.
        ValueError: other shapes, sizes that do not fit the canvas, a mean or std of other channels, or
            `resize` below `size`.

    Example:
        >>> import torch
        >>> from elastic_kernels import eval_crop
        >>> images, sizes = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 48], [30, 20]])
        >>> eval_crop(images, sizes, 16, mean=[0.5] * 3, std=[0.2] * 3).shape
        torch.Size([2, 3, 16, 16])
    """
    check_canvases(images, sizes)
    check_normalisation(images, mean, std)
    resize = round(size * 256 / 224) if resize is None else resize
    if not 1 <= size <= resize:
        raise ValueError(f"expected 1 <= size <= resize, got size {size} and resize {resize}")
    resized = resize * sizes // sizes.amin(1, keepdim=True)
    scale = sizes / resized
    corner = ((resized - size) / 2).round() * scale
    boxes = torch.cat([corner, size * scale], 1)
    limits = torch.cat([torch.zeros_like(sizes), sizes], 1)
    boxes, limits, shift, gain = upload_parts(
        [boxes, limits.float(), *normalisation(mean, std)], images.device
    )
    taps = filter_taps(scale.amax(0).tolist())
    crops = resample_boxes(product_pixels(images), boxes, limits, (size, size), None, taps)
    return crops.mul_(gain).sub_(shift)


def resample_boxes(
    pixels: Tensor,
    boxes: Tensor,
    limits: Tensor,
    size: tuple[int, int],
    flip: Tensor | None,
    taps: Sequence[int],
) -> Tensor:
    """Cut boxes out and resize them: two matrix products, all tensors on the device of the pixels.

    As in torchvision, which crops before it resizes, a crop depends on no pixel outside of `limits`.

    Args:
        pixels: `[B, C, H, W]` in the dtype of the matrix products.
        boxes: float32 `[N, 4]`, (top, left, height, width); box n is of image `n % B`.
        limits: float32 `[N, 4]`, (top, left, bottom, right) of the pixels that may be read.
        size: of the output.
        flip: bool `[N]`.
        taps: upper bounds of the pixels a filter covers, (vertically, horizontally).

    Returns:
        float32 `[N, C, *size]` in 0..255.
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
            shrunk.view(batch * views, size[1] * channels, height), rows.to(pixels.dtype).transpose(1, 2)
        )
    crops = crops.view(batch, views, size[1], channels, size[0]).permute(1, 0, 3, 4, 2)
    crops = crops.to(torch.float32, memory_format=torch.contiguous_format)
    return crops.reshape(views * batch, channels, *size).clamp_(0, 255)


def _filters(
    spans: Tensor, limits: Tensor, size: int, extent: int, taps: int, mirror: Tensor | None
) -> Tensor:
    """Bicubic filters (a = -0.5) of one axis, widened by the scale when shrinking, as Pillow's.

    `spans` `[N, 2]` are start and length of the part that is resized from `extent` to `size` pixels, `limits`
    `[N, 2]` first and end of the pixels that may be read. A filter covers at most `taps`. Where `mirror`,
    bool `[N]`, is set, output is in reverse.

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


def filter_taps(scales: Sequence[float]) -> list[int]:
    """Most pixels a bicubic filter covers along each axis, given the largest scales."""
    return [math.ceil(4 * max(scale, 1.0)) + 1 for scale in scales]


def touched_pixels(boxes: Tensor) -> Tensor:
    """(top, left, bottom, right) of the pixels that boxes (top, left, height, width) touch."""
    return torch.cat([boxes[:, :2].floor(), (boxes[:, :2] + boxes[:, 2:]).ceil()], 1)


def product_pixels(images: Tensor) -> Tensor:
    """The images in the dtype of the matrix products.

    On a GPU that is half precision, which holds 0..255 exactly and lets tensor cores do the work;
    crops are then off by about 0.04 levels, and by up to 0.3 where neighbours differ most.
    """
    return images.contiguous().to(torch.float32 if images.device.type == "cpu" else torch.float16)


def normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Shift and gain `[C, 1, 1]` with `(x / 255 - mean) / std = x * gain - shift`."""
    center = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
    deviation = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
    return center / deviation, 1 / (255 * deviation)


def upload_parts(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy CPU tensors of one dtype to the device in one transfer."""
    if not parts:
        return []
    flat = upload(torch.cat([part.flatten() for part in parts]), device)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def check_normalisation(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError unless there are a mean and a std for each channel of `[B, C, H, W]`."""
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        got = f"{len(mean)} and {len(std)}"
        raise ValueError(f"expected mean and std of channels={channels}, as the images have, got {got}")


def check_canvases(images: Tensor, sizes: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless images are uint8 `[B, C, H, W]` and sizes, if any, fit them."""
    if images.dtype != torch.uint8:
        raise TypeError(f"expected uint8 images, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] > MOST_CHANNELS or 0 in images.shape:
        wanted = f"[B, C, H, W], C up to {MOST_CHANNELS}, none of it 0"
        raise ValueError(f"expected images {wanted}, got {list(images.shape)}")
    if sizes is None:
        return
    if sizes.dtype != torch.int64:
        raise TypeError(f"expected int64 sizes, got {sizes.dtype}")
    if sizes.shape != (len(images), 2) or sizes.device.type != "cpu":
        got = f"{list(sizes.shape)} on {sizes.device}"
        raise ValueError(f"expected sizes [{len(images)}, 2] on the CPU, got {got}")
    canvas = images.shape[2:]
    if ((sizes < 1) | (sizes > torch.tensor(canvas))).any():
        low, high = sizes.amin(0).tolist(), sizes.amax(0).tolist()
        raise ValueError(f"expected sizes from [1, 1] to {list(canvas)}, got {low} to {high}")
