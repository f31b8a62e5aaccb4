"""Random multi-crop augmentation of uint8 canvases, on a GPU in a handful of launches.

    crop -> resize (antialiased bicubic) -> flip -> rotate -> jitter colours -> grayscale -> blur
    -> solarise -> normalise

for every crop with parameters of its own, drawn beforehand on the CPU. Unlike in the official pipeline, which
works on 8-bit images, nothing is rounded to integers in between. The plain definition runs each operation on
the crops that were drawn for it alone. Saturation, hue and grayscale are defined for three channels and left
out for others, whose contrast is about the mean of all channels. The Triton kernels are in
`triton_ops/crops.py`.

Source: DINO (Caron et al., 2021) and DINOv2 (Oquab et al., 2023) for the views; the operations follow
torchvision's transforms, and the resampling Pillow's bicubic filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch
from elastic_kernels.dispatch import upload
from elastic_kernels.resample import (
    check_canvases,
    check_normalisation,
    filter_taps,
    normalisation,
    product_pixels,
    resample_boxes,
    touched_pixels,
    upload_parts,
)

NEUTRAL_CROP = (1.0, 1.0, 1.0, 0.0)  # factors that change nothing
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L

Operation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CropParameters:
    """Parameters of `N = views * batch` crops, CPU tensors: all samples of the first view, then the next.

    Attributes:
        boxes: int64 or floating point `[N, 4]`, (top, left, height, width) in pixels. Of fractional edges,
            the pixels they touch are used.
        flip: bool `[N]`, mirrored left to right.
        jitter: bool `[N]`, whether the colours are jittered.
        factors: float32 `[N, 4]` of brightness, contrast, saturation (1: unchanged), hue (turns; 0:
            unchanged). An operation that changes nothing costs nothing.
        order: int64 `[N, 4]`, the operations (columns of `factors`) in the order of application.
        grayscale: bool `[N]`.
        sigma: float32 `[N]`, of the Gaussian blur in pixels; 0: no blur.
        solarize: bool `[N]`.
        angle: float32 `[N]`, degrees counter-clockwise of a bilinear rotation, or None.

    Example:
        >>> import torch
        >>> from elastic_kernels import NEUTRAL_CROP, CropParameters
        >>> boxes, no = torch.tensor([[0, 0, 32, 32]] * 4), torch.zeros(4, dtype=torch.bool)
        >>> factors, order = torch.tensor([NEUTRAL_CROP] * 4), torch.arange(4).repeat(4, 1)
        >>> CropParameters(boxes, no, no, factors, order, no, torch.zeros(4), no).boxes.shape
        torch.Size([4, 4])
    """

    boxes: Tensor
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    sigma: Tensor
    solarize: Tensor
    angle: Tensor | None = None


@torch.no_grad()
def render_crops(
    images: Tensor,
    parameters: CropParameters,
    size: int,
    *,
    blur_kernel: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut boxes out of canvases, resize, flip, rotate, recolour, blur, solarise and normalise them.

    Args:
        images: uint8 `[B, C, H, W]` of 1 to 16 channels, read in place if its rows are contiguous; crop n is
            of image `n % B`, and no pixel outside of its box reaches it.
        parameters: of the `N` crops, a multiple of `B`.
        size: side of the crops in pixels, S.
        blur_kernel: taps of the blur, odd and below 2 * S.
        mean, std: of each channel, in 0..1.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        Contiguous `[N, C, S, S]` of `dtype` on the device of `images`.

    Raises:
        TypeError: tensors of other dtypes.
        ValueError: other shapes, parameters off the CPU, boxes that are empty or leave the canvas, an order
            that does not name each operation once, a blur kernel that does not fit, or a mean or std of other
            channels.

    Numerics: products and sums in fp32, between kernels float16, which holds a level of 0..255 to 1/16.
    Results repeat bitwise. Never waits for the device: the parameters go there in one transfer. PyTorch
    jitters images of other than three channels.

    Example:
        >>> import torch
        >>> from elastic_kernels import NEUTRAL_CROP, CropParameters, render_crops
        >>> boxes, no = torch.tensor([[0, 0, 32, 32]] * 4), torch.zeros(4, dtype=torch.bool)
        >>> factors, order = torch.tensor([NEUTRAL_CROP] * 4), torch.arange(4).repeat(4, 1)
        >>> parameters = CropParameters(boxes, no, no, factors, order, no, torch.zeros(4), no)
        >>> images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        >>> render_crops(images, parameters, 16, blur_kernel=9, mean=[0.5] * 3, std=[0.2] * 3).shape
        torch.Size([4, 3, 16, 16])
    """
    check_canvases(images)
    _check_parameters(parameters, images)
    wanted = _Wanted(size, blur_kernel, mean, std, dtype)
    _check_wanted(parameters, wanted)
    check_normalisation(images, mean, std)
    make = _render_triton if crops_backend(images).backend == "triton" else _reference
    return make(images, parameters, wanted)


class _Wanted(NamedTuple):
    size: int
    blur_kernel: int
    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype


def crops_backend(images: Tensor) -> dispatch.Choice:
    """The backend for such canvases, and why."""
    return dispatch.choose("render_crops", images, dtype=torch.float32)


def _reference(images: Tensor, parameters: CropParameters, wanted: _Wanted) -> Tensor:
    """`render_crops` in plain PyTorch."""
    p, size, channels = parameters, wanted.size, images.shape[1]
    angle = torch.zeros(0) if p.angle is None else p.angle
    levels = normalisation(wanted.mean, wanted.std)
    plan = [p.boxes.float(), p.flip.float(), angle, *levels]
    boxes, flip, angle, shift, gain = upload_parts(plan, images.device)
    if not len(boxes):
        return boxes.new_empty(0, channels, size, size, dtype=wanted.dtype)
    taps = filter_taps((p.boxes[:, 2:].amax(0) / size).tolist())
    pixels = product_pixels(images)
    crops = resample_boxes(pixels, boxes, touched_pixels(boxes), (size, size), flip > 0, taps)
    if len(angle):
        crops = _rotate(crops, angle)
    blur, none = partial(_blur, wanted.blur_kernel), torch.zeros_like(p.sigma)
    _apply(crops, [*_recolouring(p, channels), (blur, p.sigma > 0, p.sigma), (_solarize, p.solarize, none)])
    return crops.mul_(gain).sub_(shift).to(wanted.dtype)


def _changes(parameters: CropParameters) -> Tensor:
    """bool `[N, 4]`, whether the jitter changes a crop by each of its operations."""
    return parameters.jitter[:, None] & (parameters.factors != torch.tensor(NEUTRAL_CROP))


def _recolouring(parameters: CropParameters, channels: int) -> list[tuple[Operation, Tensor, Tensor]]:
    """The colour operations in order, each with the crops it changes (bool `[N]`) and the amounts `[N]`."""
    p, jitter = parameters, (_brightness, _contrast, _saturation, _hue)
    changes, none = _changes(p), torch.zeros_like(p.sigma)
    steps: list[tuple[Operation, Tensor, Tensor]] = [
        (operation, changes[:, column] & (turn == column), p.factors[:, column])
        for turn in p.order.T
        for column, operation in enumerate(jitter if channels == len(LUMA) else jitter[:2])
    ]
    return [*steps, (_saturation, p.grayscale, none)] if channels == len(LUMA) else steps


def _apply(crops: Tensor, steps: Sequence[tuple[Operation, Tensor, Tensor]]) -> None:
    """Apply operations to the crops that each changes, in place."""
    plan = [(operation, mask.nonzero().flatten(), amount) for operation, mask, amount in steps]
    plan = [(operation, rows, amount[rows]) for operation, rows, amount in plan if len(rows)]
    rows = upload_parts([rows for _, rows, _ in plan], crops.device)
    amounts = upload_parts([amounts for _, _, amounts in plan], crops.device)
    for (operation, _, _), chosen, amount in zip(plan, rows, amounts, strict=True):
        changed = operation(crops.index_select(0, chosen), amount.view(-1, 1, 1, 1))
        crops.index_copy_(0, chosen, changed)


def _rotate(crops: Tensor, angle: Tensor) -> Tensor:
    """Rotate crops about their centre by degrees `[N]`, bilinear; what is missing is reflected."""
    radians = angle * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, padding_mode="reflection", align_corners=False)


def _luma(x: Tensor) -> Tensor:
    """Brightness `[n, 1, h, w]` of colours `[n, 3, h, w]`; of other channels their mean."""
    if x.shape[1] != len(LUMA):
        return x.mean(1, keepdim=True)
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


def _blur(kernel: int, x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with `kernel` taps; the border is reflected."""
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


def _render_triton(images: Tensor, parameters: CropParameters, wanted: _Wanted) -> Tensor:
    from elastic_kernels.triton_ops import crops as _  # noqa: F401, registers the operators
    from elastic_kernels.triton_ops.crops_table import crop_table

    operators, p = torch.ops.elastic_kernels, parameters
    boxes = p.boxes.float()
    rows = ((boxes[:, 0] + boxes[:, 2]).ceil() - boxes[:, 0].floor()).long()  # that each box touches
    operations, amounts = _colour_turns(p)
    shift, gain = (x.flatten() for x in normalisation(wanted.mean, wanted.std))
    table = crop_table(boxes, p.flip, rows, operations, amounts, p.sigma, p.solarize, gain, shift)
    table = upload(table, images.device)
    most_rows, all_rows = (int(rows.max()), int(rows.sum())) if len(rows) else (0, 0)
    crops = operators.crops_resample(images, table, wanted.size, most_rows, all_rows, between_kernels(images))
    if p.angle is not None:
        crops = _rotate(crops.float(), upload(p.angle, images.device)).contiguous()
    if images.shape[1] != len(LUMA):
        crops = crops.float()
        _apply(crops, _recolouring(p, images.shape[1]))
    elif (operations >= 0).any():
        operators.crops_colour_(crops, table)
    taps = wanted.blur_kernel if (p.sigma > 0).any() else 0
    return operators.crops_finish(crops, table, taps, wanted.dtype)


def between_kernels(images: Tensor) -> torch.dtype:
    """The dtype of crops between the kernels: that of the definition on a CPU, half of it on a GPU."""
    return torch.float32 if images.device.type == "cpu" else torch.float16


def _colour_turns(parameters: CropParameters) -> tuple[Tensor, Tensor]:
    """Operations and amounts `[N, TURNS]` in order; what changes nothing is skipped."""
    from elastic_kernels.triton_ops.crops_table import SATURATION, SKIPPED

    order, factors = parameters.order, parameters.factors
    jitter = order.masked_fill(~_changes(parameters).gather(1, order), SKIPPED)
    # The gray image is what a saturation of 0 leaves.
    gray = torch.where(parameters.grayscale, SATURATION.value, SKIPPED)
    amounts = torch.cat([factors.gather(1, order), torch.zeros(len(order), 1)], 1)
    return torch.cat([jitter, gray[:, None]], 1), amounts


def _check_parameters(parameters: CropParameters, images: Tensor) -> None:
    boxes = parameters.boxes
    if boxes.dtype != torch.int64 and not boxes.is_floating_point():
        raise TypeError(f"render_crops: expected boxes int64 or floating point, got {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) % len(images):
        raise ValueError(
            f"render_crops: expected boxes [N, 4], N a multiple of {len(images)}, got {list(boxes.shape)}"
        )
    bools = dict.fromkeys(("flip", "jitter", "grayscale", "solarize"), torch.bool)
    dtypes = {"boxes": boxes.dtype, "factors": torch.float32, "order": torch.int64, "sigma": torch.float32}
    angle = {} if parameters.angle is None else {"angle": torch.float32}
    for name, dtype in (dtypes | bools | angle).items():
        tensor: Tensor = getattr(parameters, name)
        shape = [len(boxes), 4] if name in ("boxes", "factors", "order") else [len(boxes)]
        if tensor.dtype != dtype:
            raise TypeError(f"render_crops: expected {name} {dtype}, got {tensor.dtype}")
        if list(tensor.shape) != shape or tensor.device.type != "cpu":
            got = f"{list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"render_crops: expected {name} {shape} on the CPU, got {got}")
    _check_boxes(boxes, list(images.shape[2:]))
    wrong = (parameters.order.sort(1).values != torch.arange(4)).any(1)
    if wrong.any():
        first = parameters.order[wrong][0].tolist()
        raise ValueError(f"render_crops: expected an order of 0, 1, 2, 3, got {first}")


def _check_boxes(boxes: Tensor, canvas: list[int]) -> None:
    """In float32, as the kernels see them."""
    start = boxes[:, :2].float()
    end = start + boxes[:, 2:].float()
    inside = (start >= 0) & (start < end) & (end <= torch.tensor(canvas))
    wrong = ~inside.all(1)
    if wrong.any():
        got = boxes[wrong][0].tolist()
        raise ValueError(f"render_crops: expected boxes (top, left, height, width) in {canvas}, got {got}")


def _check_wanted(parameters: CropParameters, wanted: _Wanted) -> None:
    size, blur_kernel, _, _, dtype = wanted
    if size < 1:
        raise ValueError(f"render_crops: expected a size of at least 1, got {size}")
    fits = blur_kernel % 2 == 1 and 1 <= blur_kernel < 2 * size
    if not fits and (parameters.sigma > 0).any():
        raise ValueError(f"render_crops: expected an odd blur_kernel in 1..{2 * size - 1}, got {blur_kernel}")
    if dtype not in dispatch.TRITON_DTYPES:
        allowed = ", ".join(map(str, dispatch.TRITON_DTYPES))
        raise TypeError(f"render_crops: expected a dtype of {allowed}, got {dtype}")
